/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/*
 * virtio_rdma: the driver's own objects, and what its files offer each other.
 *
 * What travels between driver and device is in virtio_rdma_abi.h and nowhere else.
 */
#ifndef VRDMA_H
#define VRDMA_H

#include <linux/completion.h>
#include <linux/idr.h>
#include <linux/mutex.h>
#include <linux/netdevice.h>
#include <linux/refcount.h>
#include <linux/spinlock.h>
#include <linux/virtio.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>

#include <rdma/ib_umem.h>
#include <rdma/ib_verbs.h>
#include <rdma/rdma_user_rxe.h>
#include <rdma/uverbs_ioctl.h>

#include "virtio_rdma_abi.h"

#define VRDMA_DRV_NAME		"virtio_rdma"
#define VRDMA_DEV_NAME		"rxe_vrdma%d"
#define VRDMA_UVERBS_ABI	2	/* that of the rxe provider */
#define VRDMA_PORT		1

/* An answer takes microseconds: these are for a device that is stuck */
#define VRDMA_CMD_LOOK		(HZ / 5)
#define VRDMA_CMD_WARN		(10 * HZ)

/* Zeroed pages that are shared with the device, and perhaps with a process */
struct vrdma_pages {
	struct page **pages;
	unsigned int num;
};

struct vrdma_area {
	struct vrdma_pages mem;
	void *base;
};

/* A work or completion ring */
struct vrdma_ring {
	struct rdma_user_mmap_entry entry;
	struct kref ref;
	struct list_head parked;
	struct vrdma_pages mem;
	u32 entries;
	u32 stride;
	u32 num_extents;
	bool mappable;
	struct rxe_queue_buf *header;	/* the whole ring, if a user in the kernel has it */
};

struct vrdma_ctrl {
	struct virtqueue *vq;
	spinlock_t lock;		/* the virtqueue, and the state of commands in it */
	wait_queue_head_t room;
	struct list_head drained;
	u32 max_request;
};

struct vrdma_eventq {
	struct virtqueue *vq;
	spinlock_t lock;		/* the virtqueue */
	struct virtio_rdma_event *bufs;
	unsigned int num_bufs;
	struct work_struct more;
	bool drained;
};

/* The doorbells of one worker of the device */
struct vrdma_doorbellq {
	struct virtqueue *vq;
	struct vrdma_area area;
	__le32 *sleeping;
	unsigned long *summary;
	unsigned long *bitmap;
};

struct vrdma_attr {
	u64 max_mr_size;
	u32 access_flags;
	u32 max_qp;
	u32 max_qp_wr;
	u32 max_sge;
	u32 max_inline_data;
	u32 max_cq;
	u32 max_cqe;
	u32 max_mr;
	u32 max_mw;
	u32 max_pd;
	u32 max_srq;
	u32 max_mcast_grp;
	u32 max_mcast_qp_attach;
	u32 max_ah;
	u32 max_doorbells;
	u32 max_gids;
	u32 max_rd_atomic;
	u32 max_fast_reg;
	u32 qp_types;
	u32 max_msg_size;
	enum ib_atomic_cap atomic_cap;
	u32 vendor_id;
};

/*
 * Handles that were destroyed and are valid still, oldest first: [tail, mark) go the next time,
 * [mark, head) the time after that
 */
struct vrdma_ah_retired {
	spinlock_t lock;		/* for all of it */
	u32 *nums;			/* a ring with room for all */
	u32 mask;
	u32 tail;
	u32 mark;
	u32 head;
	struct delayed_work work;
};

struct vrdma_dev {
	struct ib_device ibdev;		/* first, as ib_alloc_device() demands */
	struct virtio_device *vdev;
	struct vrdma_attr attr;
	u8 mac[ETH_ALEN];
	u8 max_mtu;
	u8 active_mtu;
	u32 speed_mbps;
	u16 link_up;

	struct virtqueue **vqs;
	struct vrdma_ctrl ctrl;
	u16 num_eventqs;
	u16 num_doorbellqs;
	struct vrdma_eventq *eventqs;
	struct vrdma_doorbellq *doorbellqs;
	struct vrdma_area arm;
	struct vrdma_area ah;
	struct ida ah_ida;
	struct vrdma_ah_retired ah_retired;

	struct xarray cqs;
	struct xarray qps;
	struct xarray srqs;
	struct xarray odps;		/* regions with on-demand paging */
	bool on_demand;			/* the device offers it */
	void *zeros;			/* a page of them, for the device to read */

	struct notifier_block netdev_nb;
	spinlock_t netdev_lock;		/* the two below */
	struct net_device *netdev;
	struct list_head old_netdevs;	/* GIDs to delete */
	struct work_struct port_work;
	unsigned long port_flags;
	enum ib_port_state port_state;	/* as last told to applications */

	unsigned long state;
	struct mutex silence_lock;	/* only one resets a dead device */
	struct mutex parked_lock;	/* the three lists */
	struct list_head parked_rings;
	struct list_head parked_umems;
	struct list_head parked_pages;
};

/* Bits of vrdma_dev.state */
enum {
	VRDMA_DEAD,		/* the device does not answer and may still use our memory */
	VRDMA_REMOVING,
	VRDMA_SILENT,		/* it is dead, and was reset */
};

/* Bits of vrdma_dev.port_flags */
enum {
	VRDMA_PORT_RESCAN,	/* another netdev: its GIDs are to be added */
	VRDMA_PORT_CONFIG,	/* the configuration space changed */
};

struct vrdma_ucontext {
	struct ib_ucontext ibuc;
};

struct vrdma_pd {
	struct ib_pd ibpd;
	u32 pdn;
};

struct vrdma_ah {
	struct ib_ah ibah;
	u32 num;
};

struct vrdma_mr {
	struct ib_mr ibmr;
	struct ib_umem *umem;		/* NULL for memory of the kernel */
	u64 iova;
	int access;
	struct virtio_rdma_extent *extents;	/* of a region for fast registration */
	u32 num_extents;
	u32 max_extents;
	struct vrdma_odp *odp;		/* with on-demand paging; it has the umem then */
};

struct vrdma_mw {
	struct ib_mw ibmw;
};

struct vrdma_cq {
	struct ib_cq ibcq;
	u32 cqn;
	u32 *arm;
	struct vrdma_ring *ring;
	spinlock_t lock;	/* the ring, and taking from a kernel's */
	struct mutex resize_lock;
	refcount_t ref;
	struct completion idle;
};

struct vrdma_srq {
	struct ib_srq ibsrq;
	u32 srqn;
	u32 max_sge;
	struct vrdma_ring *ring;
	spinlock_t lock;	/* posting to a kernel's ring */
	struct mutex resize_lock;	/* which ring it is */
	refcount_t ref;
	struct completion idle;
};

struct vrdma_qp {
	struct ib_qp ibqp;
	struct vrdma_doorbellq *dbq;
	u32 doorbell;
	struct vrdma_ring *sq;
	struct vrdma_ring *rq;	/* NULL with an SRQ */
	spinlock_t sq_lock;	/* posting to a kernel's rings */
	spinlock_t rq_lock;
	struct mutex modify_lock;	/* changes of state, and asking for it */
	enum ib_qp_state state;		/* changed under the locks of both queues */
	bool failed;			/* completions say that the device moved it to ERR */
	struct ib_qp_cap cap;
	enum ib_sig_type sq_sig_type;
	refcount_t ref;
	struct completion idle;
};

static inline struct vrdma_dev *to_vdev(struct ib_device *ibdev)
{
	return container_of(ibdev, struct vrdma_dev, ibdev);
}

static inline struct vrdma_pd *to_vpd(struct ib_pd *ibpd)
{
	return container_of(ibpd, struct vrdma_pd, ibpd);
}

static inline struct vrdma_ah *to_vah(struct ib_ah *ibah)
{
	return container_of(ibah, struct vrdma_ah, ibah);
}

static inline struct vrdma_mr *to_vmr(struct ib_mr *ibmr)
{
	return container_of(ibmr, struct vrdma_mr, ibmr);
}

static inline struct vrdma_cq *to_vcq(struct ib_cq *ibcq)
{
	return container_of(ibcq, struct vrdma_cq, ibcq);
}

static inline struct vrdma_srq *to_vsrq(struct ib_srq *ibsrq)
{
	return container_of(ibsrq, struct vrdma_srq, ibsrq);
}

static inline struct vrdma_qp *to_vqp(struct ib_qp *ibqp)
{
	return container_of(ibqp, struct vrdma_qp, ibqp);
}

static inline bool vrdma_is_dead(const struct vrdma_dev *dev)
{
	return test_bit(VRDMA_DEAD, &dev->state);
}

/* ctrlq.c */
struct vrdma_cmd;
int vrdma_ctrl_init(struct vrdma_dev *dev, struct virtqueue *vq);
void vrdma_ctrl_drain(struct vrdma_dev *dev);
void vrdma_ctrl_free(struct vrdma_dev *dev);
void vrdma_ctrl_done(struct virtqueue *vq);
struct vrdma_cmd *vrdma_cmd_alloc(u16 opcode, size_t body_len, u32 num_extents,
				  size_t result_len);
void *vrdma_cmd_body(struct vrdma_cmd *cmd);
struct virtio_rdma_extent *vrdma_cmd_extents(struct vrdma_cmd *cmd);
const void *vrdma_cmd_result(const struct vrdma_cmd *cmd);
int vrdma_cmd_submit(struct vrdma_dev *dev, struct vrdma_cmd *cmd);
int vrdma_cmd_wait(struct vrdma_dev *dev, struct vrdma_cmd *cmd);
int vrdma_cmd_again(struct vrdma_dev *dev, struct vrdma_cmd *cmd);
void vrdma_cmd_shrink(struct vrdma_cmd *cmd, u32 num_extents);
int vrdma_cmd_run(struct vrdma_dev *dev, struct vrdma_cmd *cmd);
void vrdma_cmd_free(struct vrdma_dev *dev, struct vrdma_cmd *cmd);
u32 vrdma_cmd_max_extents(struct vrdma_dev *dev, size_t body_len);
int vrdma_ctrl_call(struct vrdma_dev *dev, u16 opcode, const void *body, size_t body_len,
		    void *result, size_t result_len);
void vrdma_ctrl_must(struct vrdma_dev *dev, u16 opcode, const void *body, size_t body_len);
void vrdma_ctrl_destroy(struct vrdma_dev *dev, u16 opcode, u32 number);
int vrdma_ctrl_destroy_unused(struct vrdma_dev *dev, u16 opcode, u32 number);
void vrdma_dev_fail(struct vrdma_dev *dev, const char *why);

/* memory.c */
int vrdma_pages_alloc(struct vrdma_pages *mem, size_t size, gfp_t gfp);
void vrdma_pages_free(struct vrdma_pages *mem);
u32 vrdma_pages_extents(const struct vrdma_pages *mem, struct virtio_rdma_extent *out);
int vrdma_area_create(struct vrdma_dev *dev, struct vrdma_area *area, u16 kind, u16 index,
		      size_t size);
void vrdma_area_free(struct vrdma_area *area);
struct vrdma_ring *vrdma_ring_create(u32 min_entries, u32 elem_size);
void vrdma_ring_describe(const struct vrdma_ring *ring, struct virtio_rdma_ring_desc *desc);
int vrdma_ring_exchange(struct vrdma_dev *dev, u16 opcode, u32 number,
			const struct vrdma_ring *ring);
int vrdma_ring_map(struct vrdma_ring *ring, struct ib_udata *udata, struct mminfo *info);
void vrdma_ring_release(struct vrdma_dev *dev, struct vrdma_ring *ring);
int vrdma_ring_vmap(struct vrdma_ring *ring);
struct rxe_queue_buf *vrdma_ring_header(const struct vrdma_ring *ring);
int vrdma_mmap(struct ib_ucontext *ibuc, struct vm_area_struct *vma);
void vrdma_mmap_free(struct rdma_user_mmap_entry *entry);
void vrdma_umem_release(struct vrdma_dev *dev, struct ib_umem *umem);
void vrdma_page_park(struct vrdma_dev *dev, struct page *page);
void vrdma_unpark(struct vrdma_dev *dev);

/* event.c */
int vrdma_events_init(struct vrdma_dev *dev);
int vrdma_events_fill(struct vrdma_dev *dev);
void vrdma_events_drain(struct vrdma_dev *dev);
void vrdma_events_free(struct vrdma_dev *dev);
void vrdma_event_arrived(struct virtqueue *vq);

/* netdev.c */
int vrdma_netdev_init(struct vrdma_dev *dev);
void vrdma_netdev_exit(struct vrdma_dev *dev);
void vrdma_port_changed(struct vrdma_dev *dev, unsigned int flag);
struct net_device *vrdma_get_netdev(struct ib_device *ibdev, u32 port);
enum ib_port_state vrdma_port_state(struct vrdma_dev *dev, bool *enabled);

/* main.c */
void vrdma_dev_silence(struct vrdma_dev *dev);
extern struct workqueue_struct *vrdma_wq;
void vrdma_dealloc_driver(struct ib_device *ibdev);

/* verbs.c */
void vrdma_set_ops(struct vrdma_dev *dev);
int vrdma_query_attr(struct vrdma_dev *dev);

/* gid.c */
int vrdma_add_gid(const struct ib_gid_attr *attr, void **context);
int vrdma_del_gid(const struct ib_gid_attr *attr, void **context);

/* pd.c */
int vrdma_alloc_pd(struct ib_pd *ibpd, struct ib_udata *udata);
int vrdma_dealloc_pd(struct ib_pd *ibpd, struct ib_udata *udata);

/* ah.c */
int vrdma_create_ah(struct ib_ah *ibah, struct rdma_ah_init_attr *init, struct ib_udata *udata);
int vrdma_modify_ah(struct ib_ah *ibah, struct rdma_ah_attr *attr);
int vrdma_query_ah(struct ib_ah *ibah, struct rdma_ah_attr *attr);
int vrdma_destroy_ah(struct ib_ah *ibah, u32 flags);
void vrdma_ah_init(struct vrdma_dev *dev);
int vrdma_ah_create_area(struct vrdma_dev *dev);
void vrdma_ah_exit(struct vrdma_dev *dev);

/* mr.c */
struct ib_mr *vrdma_reg_user_mr(struct ib_pd *ibpd, u64 start, u64 length, u64 iova, int access,
				struct ib_udata *udata);
struct ib_mr *vrdma_rereg_user_mr(struct ib_mr *ibmr, int flags, u64 start, u64 length, u64 iova,
				  int access, struct ib_pd *ibpd, struct ib_udata *udata);
int vrdma_dereg_mr(struct ib_mr *ibmr, struct ib_udata *udata);

/* odp.c */
#if IS_ENABLED(CONFIG_INFINIBAND_ON_DEMAND_PAGING)
void vrdma_odp_init(struct vrdma_dev *dev);
void vrdma_odp_exit(struct vrdma_dev *dev);
void vrdma_odp_query(struct vrdma_dev *dev, struct ib_device_attr *attr);
void vrdma_odp_fault(struct vrdma_dev *dev, const struct virtio_rdma_event *event);
int vrdma_odp_reg(struct vrdma_dev *dev, struct vrdma_mr *mr, u32 pdn, u64 start, u64 length,
		  u64 iova, int access);
int vrdma_odp_dereg(struct vrdma_dev *dev, struct vrdma_mr *mr);
bool vrdma_odp_writable(const struct vrdma_mr *mr);
#else
static inline void vrdma_odp_init(struct vrdma_dev *dev)
{
}

static inline void vrdma_odp_exit(struct vrdma_dev *dev)
{
}

static inline void vrdma_odp_query(struct vrdma_dev *dev, struct ib_device_attr *attr)
{
}

static inline void vrdma_odp_fault(struct vrdma_dev *dev, const struct virtio_rdma_event *event)
{
}

static inline int vrdma_odp_reg(struct vrdma_dev *dev, struct vrdma_mr *mr, u32 pdn, u64 start,
				u64 length, u64 iova, int access)
{
	return -EOPNOTSUPP;
}

static inline int vrdma_odp_dereg(struct vrdma_dev *dev, struct vrdma_mr *mr)
{
	return 0;
}

static inline bool vrdma_odp_writable(const struct vrdma_mr *mr)
{
	return false;
}
#endif

/* kmr.c */
struct ib_mr *vrdma_get_dma_mr(struct ib_pd *ibpd, int access);
struct ib_mr *vrdma_alloc_mr(struct ib_pd *ibpd, enum ib_mr_type type, u32 max_num_sg);
int vrdma_map_mr_sg(struct ib_mr *ibmr, struct scatterlist *sg, int sg_nents,
		    unsigned int *sg_offset);

/* mw.c */
int vrdma_alloc_mw(struct ib_mw *ibmw, struct ib_udata *udata);
int vrdma_dealloc_mw(struct ib_mw *ibmw);

/* cq.c */
int vrdma_create_cq(struct ib_cq *ibcq, const struct ib_cq_init_attr *attr,
		    struct ib_udata *udata);
int vrdma_resize_cq(struct ib_cq *ibcq, unsigned int cqe, struct ib_udata *udata);
int vrdma_destroy_cq(struct ib_cq *ibcq, struct ib_udata *udata);
int vrdma_req_notify_cq(struct ib_cq *ibcq, enum ib_cq_notify_flags flags);
struct vrdma_cq *vrdma_cq_get(struct vrdma_dev *dev, u32 cqn);
void vrdma_cq_put(struct vrdma_cq *cq);

/* qp.c */
int vrdma_create_qp(struct ib_qp *ibqp, struct ib_qp_init_attr *init, struct ib_udata *udata);
int vrdma_modify_qp(struct ib_qp *ibqp, struct ib_qp_attr *attr, int mask,
		    struct ib_udata *udata);
int vrdma_query_qp(struct ib_qp *ibqp, struct ib_qp_attr *attr, int mask,
		   struct ib_qp_init_attr *init);
int vrdma_destroy_qp(struct ib_qp *ibqp, struct ib_udata *udata);
struct vrdma_qp *vrdma_qp_get(struct vrdma_dev *dev, u32 qpn);
void vrdma_qp_put(struct vrdma_qp *qp);
void vrdma_qp_failed(struct vrdma_dev *dev, u32 qpn);

/* post.c */
int vrdma_post_send(struct ib_qp *ibqp, const struct ib_send_wr *wr,
		    const struct ib_send_wr **bad_wr);
int vrdma_post_recv(struct ib_qp *ibqp, const struct ib_recv_wr *wr,
		    const struct ib_recv_wr **bad_wr);
int vrdma_post_srq_recv(struct ib_srq *ibsrq, const struct ib_recv_wr *wr,
			const struct ib_recv_wr **bad_wr);

/* poll.c */
int vrdma_poll_cq(struct ib_cq *ibcq, int num, struct ib_wc *wc);

/* mcast.c */
int vrdma_attach_mcast(struct ib_qp *ibqp, union ib_gid *gid, u16 lid);
int vrdma_detach_mcast(struct ib_qp *ibqp, union ib_gid *gid, u16 lid);

/* srq.c */
int vrdma_create_srq(struct ib_srq *ibsrq, struct ib_srq_init_attr *init, struct ib_udata *udata);
int vrdma_modify_srq(struct ib_srq *ibsrq, struct ib_srq_attr *attr, enum ib_srq_attr_mask mask,
		     struct ib_udata *udata);
int vrdma_query_srq(struct ib_srq *ibsrq, struct ib_srq_attr *attr);
int vrdma_destroy_srq(struct ib_srq *ibsrq, struct ib_udata *udata);
struct vrdma_srq *vrdma_srq_get(struct vrdma_dev *dev, u32 srqn);
void vrdma_srq_put(struct vrdma_srq *srq);

#endif
