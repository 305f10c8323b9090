/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/*
 * Where the kernel's interfaces differ between 6.1 and 7.x. No other file looks at the version.
 */
#ifndef VRDMA_COMPAT_H
#define VRDMA_COMPAT_H

#include <linux/err.h>
#include <linux/slab.h>
#include <linux/version.h>
#include <linux/virtio_config.h>

#include <rdma/ib_umem.h>
#include <rdma/ib_verbs.h>
#include <rdma/uverbs_ioctl.h>

#include "vrdma.h"

/* Memory shared with a host that has several CPUs needs real locked operations,
 * which bitops.h does not give to a guest that has one.
 */
#if defined(CONFIG_X86) || defined(CONFIG_UML) || defined(CONFIG_ARM64)
#include <asm/sync_bitops.h>
#define vrdma_test_and_set_bit(nr, addr)	sync_test_and_set_bit(nr, addr)
#define vrdma_cmpxchg(ptr, old, new)		sync_cmpxchg(ptr, old, new)
#else
#include <linux/bitops.h>
#define vrdma_test_and_set_bit(nr, addr)	test_and_set_bit(nr, addr)
#define vrdma_cmpxchg(ptr, old, new)		cmpxchg(ptr, old, new)
#endif

static inline int vrdma_find_vqs(struct virtio_device *vdev, unsigned int num,
				 struct virtqueue **vqs, vq_callback_t **callbacks,
				 const char **names)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 11, 0)
	struct virtqueue_info *info;
	unsigned int i;
	int ret;

	info = kcalloc(num, sizeof(*info), GFP_KERNEL);
	if (!info)
		return -ENOMEM;
	for (i = 0; i < num; i++) {
		info[i].name = names[i];
		info[i].callback = callbacks[i];
	}
	ret = virtio_find_vqs(vdev, num, vqs, info, NULL);
	kfree(info);
	return ret;
#else
	return virtio_find_vqs(vdev, num, vqs, callbacks, (const char * const *)names, NULL);
#endif
}

static inline void vrdma_keep_name(struct ib_device *ibdev)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 12, 0)
	ib_mark_name_assigned_by_user(ibdev);
#endif
}

/* Deletes the GIDs of an interface that stays; kernels that cannot keep them until it goes */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 12, 2)
#define VRDMA_CAN_DELETE_GIDS	true
static inline void vrdma_delete_gids(struct ib_device *ibdev, u32 port, struct net_device *ndev)
{
	roce_del_all_netdev_gids(ibdev, port, ndev);
}
#else
#define VRDMA_CAN_DELETE_GIDS	false
static inline void vrdma_delete_gids(struct ib_device *ibdev, u32 port, struct net_device *ndev)
{
}
#endif

static inline struct ib_umem *vrdma_umem_get(struct ib_device *ibdev, unsigned long addr,
					     size_t size, int access)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(7, 2, 0)
	return ib_umem_get_va(ibdev, addr, size, access);
#else
	return ib_umem_get(ibdev, addr, size, access);
#endif
}

#if IS_ENABLED(CONFIG_INFINIBAND_ON_DEMAND_PAGING)
#include <rdma/ib_umem_odp.h>

/* How a umem is asked for pages, and where it has them */
#ifdef ODP_WRITE_ALLOWED_BIT
#define VRDMA_UMEM_READ		ODP_READ_ALLOWED_BIT
#define VRDMA_UMEM_WRITE	ODP_WRITE_ALLOWED_BIT
static inline const unsigned long *vrdma_umem_pfns(const struct ib_umem_odp *umem)
{
	return umem->pfn_list;
}
#else
#define VRDMA_UMEM_READ		0
#define VRDMA_UMEM_WRITE	HMM_PFN_WRITE
static inline const unsigned long *vrdma_umem_pfns(const struct ib_umem_odp *umem)
{
	return umem->map.pfn_list;
}
#endif

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 16, 0)
#define VRDMA_ODP_ORDERING	(IB_ODP_SUPPORT_FLUSH | IB_ODP_SUPPORT_ATOMIC_WRITE)
#else
#define VRDMA_ODP_ORDERING	0
#endif
#endif

/* ATOMIC_WRITE is part of the device ABI, FLUSH where a region can have access for it */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 2, 0)
static inline u64 vrdma_ordering_caps(u32 access_flags)
{
	return IB_DEVICE_ATOMIC_WRITE |
	       (access_flags & IB_ACCESS_FLUSH_GLOBAL ? IB_DEVICE_FLUSH_GLOBAL : 0);
}
#else
static inline u64 vrdma_ordering_caps(u32 access_flags)
{
	return 0;
}
#endif

/* Entry points whose prototypes changed */

#if LINUX_VERSION_CODE >= KERNEL_VERSION(7, 2, 0)
static inline int vrdma_op_resize_cq(struct ib_cq *ibcq, unsigned int cqe,
				     struct ib_udata *udata)
{
	return vrdma_resize_cq(ibcq, cqe, udata);
}
#else
#define resize_user_cq	resize_cq	/* the name of the operation before */
static inline int vrdma_op_resize_cq(struct ib_cq *ibcq, int cqe, struct ib_udata *udata)
{
	return cqe < 0 ? -EINVAL : vrdma_resize_cq(ibcq, cqe, udata);
}
#endif

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 11, 0)
static inline int vrdma_op_create_cq(struct ib_cq *ibcq, const struct ib_cq_init_attr *attr,
				     struct uverbs_attr_bundle *attrs)
{
	return vrdma_create_cq(ibcq, attr, attrs ? &attrs->driver_udata : NULL);
}
#else
static inline int vrdma_op_create_cq(struct ib_cq *ibcq, const struct ib_cq_init_attr *attr,
				     struct ib_udata *udata)
{
	return vrdma_create_cq(ibcq, attr, udata);
}
#endif

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 17, 0)
static inline struct ib_mr *vrdma_op_reg_user_mr(struct ib_pd *ibpd, u64 start, u64 length,
						 u64 iova, int access, struct ib_dmah *dmah,
						 struct ib_udata *udata)
{
	if (dmah)
		return ERR_PTR(-EOPNOTSUPP);
	return vrdma_reg_user_mr(ibpd, start, length, iova, access, udata);
}
#else
static inline struct ib_mr *vrdma_op_reg_user_mr(struct ib_pd *ibpd, u64 start, u64 length,
						 u64 iova, int access, struct ib_udata *udata)
{
	return vrdma_reg_user_mr(ibpd, start, length, iova, access, udata);
}
#endif

#endif
