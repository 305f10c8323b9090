// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * Address handles: records in an area that the device reads. No command is involved, so they can
 * be made in atomic context.
 */
#include <linux/idr.h>
#include <linux/log2.h>
#include <linux/mm.h>

#include <rdma/ib_addr.h>

#include "vrdma.h"

static struct virtio_rdma_ah *vrdma_ah_record(struct vrdma_dev *dev, u32 num)
{
	return dev->ah.base + (size_t)num * VIRTIO_RDMA_AH_STRIDE;
}

/* Fills everything but the flags */
static void vrdma_ah_fill(struct virtio_rdma_ah *rec, u32 pdn, const struct rdma_ah_attr *attr)
{
	const struct ib_global_route *grh = rdma_ah_read_grh(attr);

	rec->port_num = rdma_ah_get_port_num(attr);
	rec->sgid_index = cpu_to_le16(grh->sgid_index);
	rec->pdn = cpu_to_le32(pdn);
	memcpy(rec->dgid, grh->dgid.raw, sizeof(rec->dgid));
	rec->flow_label = cpu_to_le32(grh->flow_label);
	rec->hop_limit = grh->hop_limit;
	rec->traffic_class = grh->traffic_class;
	rec->sl = rdma_ah_get_sl(attr);
}

static void vrdma_ah_enable(struct virtio_rdma_ah *rec)
{
	/* The device must not see the flag before what it stands for */
	virt_wmb();
	WRITE_ONCE(rec->flags, VIRTIO_RDMA_AH_VALID);
}

static void vrdma_ah_disable(struct virtio_rdma_ah *rec)
{
	WRITE_ONCE(rec->flags, 0);
	/* The device must not see the next content with the old flag */
	virt_wmb();
}

/*
 * A NIC reads an address when a work request is posted, this device when the request's turn comes.
 * Who sends datagrams and ends waits for neither, so handles live on for a while.
 */
#define VRDMA_AH_LIFE (HZ / 10)

/* So many are freed under one hold of the lock */
#define VRDMA_AH_BATCH 64

/* Frees a few of those before `until`; true if there are more. Called with the lock. */
static bool vrdma_ah_bury(struct vrdma_dev *dev, u32 until)
{
	struct vrdma_ah_retired *retired = &dev->ah_retired;
	unsigned int left = VRDMA_AH_BATCH;
	u32 num;

	while (retired->tail != until && left--) {
		num = retired->nums[retired->tail++ & retired->mask];
		vrdma_ah_disable(vrdma_ah_record(dev, num));
		ida_free(&dev->ah_ida, num);
	}
	return retired->tail != until;
}

static void vrdma_ah_work(struct work_struct *work)
{
	struct vrdma_ah_retired *retired =
		container_of(work, struct vrdma_ah_retired, work.work);
	struct vrdma_dev *dev = container_of(retired, struct vrdma_dev, ah_retired);

	spin_lock_irq(&retired->lock);
	while (vrdma_ah_bury(dev, retired->mark)) {
		spin_unlock_irq(&retired->lock);
		cond_resched();
		spin_lock_irq(&retired->lock);
	}
	retired->mark = retired->head;
	if (retired->tail != retired->head)
		queue_delayed_work(vrdma_wq, &retired->work, VRDMA_AH_LIFE);
	spin_unlock_irq(&retired->lock);
}

static void vrdma_ah_retire(struct vrdma_dev *dev, u32 num)
{
	struct vrdma_ah_retired *retired = &dev->ah_retired;
	unsigned long flags;

	spin_lock_irqsave(&retired->lock, flags);
	if (retired->tail == retired->head)
		queue_delayed_work(vrdma_wq, &retired->work, VRDMA_AH_LIFE);
	retired->nums[retired->head++ & retired->mask] = num;
	spin_unlock_irqrestore(&retired->lock, flags);
}

/* When there is no other, the oldest of those that were destroyed are had at once */
static int vrdma_ah_number(struct vrdma_dev *dev, gfp_t gfp)
{
	struct vrdma_ah_retired *retired = &dev->ah_retired;
	unsigned long flags;
	int num;

	num = ida_alloc_range(&dev->ah_ida, 1, dev->attr.max_ah - 1, gfp);
	if (num != -ENOSPC)
		return num;
	spin_lock_irqsave(&retired->lock, flags);
	vrdma_ah_bury(dev, retired->head);
	if (retired->head - retired->tail < retired->head - retired->mark)
		retired->mark = retired->tail;
	spin_unlock_irqrestore(&retired->lock, flags);
	return ida_alloc_range(&dev->ah_ida, 1, dev->attr.max_ah - 1, gfp);
}

void vrdma_ah_init(struct vrdma_dev *dev)
{
	ida_init(&dev->ah_ida);
	spin_lock_init(&dev->ah_retired.lock);
	INIT_DELAYED_WORK(&dev->ah_retired.work, vrdma_ah_work);
}

int vrdma_ah_create_area(struct vrdma_dev *dev)
{
	struct vrdma_ah_retired *retired = &dev->ah_retired;
	u32 room = roundup_pow_of_two(dev->attr.max_ah);

	retired->nums = kvcalloc(room, sizeof(*retired->nums), GFP_KERNEL);
	if (!retired->nums)
		return -ENOMEM;
	retired->mask = room - 1;
	return vrdma_area_create(dev, &dev->ah, VIRTIO_RDMA_AREA_ADDRESS_HANDLE, 0,
				 (size_t)dev->attr.max_ah * VIRTIO_RDMA_AH_STRIDE);
}

/* There are no handles any more */
void vrdma_ah_exit(struct vrdma_dev *dev)
{
	cancel_delayed_work_sync(&dev->ah_retired.work);
	kvfree(dev->ah_retired.nums);
	vrdma_area_free(&dev->ah);
	ida_destroy(&dev->ah_ida);
}

static int vrdma_ah_check(struct vrdma_dev *dev, const struct rdma_ah_attr *attr)
{
	if (!rdma_is_port_valid(&dev->ibdev, rdma_ah_get_port_num(attr)) ||
	    !(rdma_ah_get_ah_flags(attr) & IB_AH_GRH) ||
	    rdma_ah_read_grh(attr)->sgid_index >= dev->attr.max_gids)
		return -EINVAL;
	return 0;
}

int vrdma_create_ah(struct ib_ah *ibah, struct rdma_ah_init_attr *init, struct ib_udata *udata)
{
	struct vrdma_dev *dev = to_vdev(ibah->device);
	struct rxe_create_ah_resp resp = {};
	struct vrdma_ah *ah = to_vah(ibah);
	int num, ret;

	/* Old providers put the address into each work request, where the device does not look */
	if (udata && udata->outlen < sizeof(resp))
		return -EOPNOTSUPP;
	ret = vrdma_ah_check(dev, init->ah_attr);
	if (ret)
		return ret;
	num = vrdma_ah_number(dev, init->flags & RDMA_CREATE_AH_SLEEPABLE ?
			      GFP_KERNEL : GFP_ATOMIC);
	if (num < 0)
		return num == -ENOSPC ? -ENOMEM : num;
	ah->num = num;
	resp.ah_num = num;
	if (udata) {
		ret = ib_copy_to_udata(udata, &resp, sizeof(resp));
		if (ret) {
			ida_free(&dev->ah_ida, num);
			return ret;
		}
	}
	vrdma_ah_fill(vrdma_ah_record(dev, num), to_vpd(ibah->pd)->pdn, init->ah_attr);
	vrdma_ah_enable(vrdma_ah_record(dev, num));
	return 0;
}

int vrdma_modify_ah(struct ib_ah *ibah, struct rdma_ah_attr *attr)
{
	struct vrdma_dev *dev = to_vdev(ibah->device);
	struct virtio_rdma_ah *rec = vrdma_ah_record(dev, to_vah(ibah)->num);
	int ret;

	ret = vrdma_ah_check(dev, attr);
	if (ret)
		return ret;
	vrdma_ah_disable(rec);
	vrdma_ah_fill(rec, to_vpd(ibah->pd)->pdn, attr);
	vrdma_ah_enable(rec);
	return 0;
}

int vrdma_query_ah(struct ib_ah *ibah, struct rdma_ah_attr *attr)
{
	struct virtio_rdma_ah *rec = vrdma_ah_record(to_vdev(ibah->device), to_vah(ibah)->num);

	memset(attr, 0, sizeof(*attr));
	attr->type = ibah->type;
	rdma_ah_set_port_num(attr, rec->port_num);
	rdma_ah_set_sl(attr, rec->sl);
	rdma_ah_set_grh(attr, NULL, le32_to_cpu(rec->flow_label), le16_to_cpu(rec->sgid_index),
			rec->hop_limit, rec->traffic_class);
	rdma_ah_set_dgid_raw(attr, rec->dgid);
	return 0;
}

int vrdma_destroy_ah(struct ib_ah *ibah, u32 flags)
{
	vrdma_ah_retire(to_vdev(ibah->device), to_vah(ibah)->num);
	return 0;
}
