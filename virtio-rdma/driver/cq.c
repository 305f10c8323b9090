// SPDX-License-Identifier: GPL-2.0 OR MIT
/* Completion queues. */
#include <linux/log2.h>

#include "doorbell.h"
#include "vrdma.h"

/* Elements are struct ib_uverbs_wc, in 64 bytes */
#define VRDMA_CQE_SIZE	64

/*
 * Some to spare save a program that makes its CQ smaller while requests are under way from an
 * overflow. Not all that fit into the page: programs take the size that they get for one to fill.
 */
#define VRDMA_MIN_CQE	7

static struct vrdma_ring *vrdma_cq_ring_create(struct vrdma_dev *dev, u32 cqe)
{
	u32 min_cqe = min_t(u32, VRDMA_MIN_CQE, dev->ibdev.attrs.max_cqe);

	return vrdma_ring_create(max(cqe, min_cqe), VRDMA_CQE_SIZE);
}

struct vrdma_cq *vrdma_cq_get(struct vrdma_dev *dev, u32 cqn)
{
	struct vrdma_cq *cq;
	unsigned long flags;

	xa_lock_irqsave(&dev->cqs, flags);
	cq = xa_load(&dev->cqs, cqn);
	if (cq && !refcount_inc_not_zero(&cq->ref))
		cq = NULL;
	xa_unlock_irqrestore(&dev->cqs, flags);
	return cq;
}

void vrdma_cq_put(struct vrdma_cq *cq)
{
	if (refcount_dec_and_test(&cq->ref))
		complete(&cq->idle);
}

static int vrdma_cq_create_on_device(struct vrdma_dev *dev, struct vrdma_cq *cq, u16 vector)
{
	struct virtio_rdma_create_cq *req;
	const struct virtio_rdma_object_resp *resp;
	struct vrdma_cmd *cmd;
	int ret;

	if (cq->ring->num_extents > vrdma_cmd_max_extents(dev, sizeof(*req)))
		return -ENOMEM;
	cmd = vrdma_cmd_alloc(VIRTIO_RDMA_CMD_CREATE_CQ, sizeof(*req), cq->ring->num_extents,
			      sizeof(*resp));
	if (!cmd)
		return -ENOMEM;
	req = vrdma_cmd_body(cmd);
	req->vector = cpu_to_le16(vector);
	vrdma_ring_describe(cq->ring, &req->ring);
	vrdma_pages_extents(&cq->ring->mem, vrdma_cmd_extents(cmd));
	ret = vrdma_cmd_run(dev, cmd);
	if (!ret) {
		resp = vrdma_cmd_result(cmd);
		cq->cqn = le32_to_cpu(resp->number);
	}
	vrdma_cmd_free(dev, cmd);
	return ret;
}

/*
 * Events find the CQ from here on. The device may have given its number to a new CQ by the time
 * that the old one is withdrawn: each takes only its own entry.
 */
static int vrdma_cq_publish(struct vrdma_dev *dev, struct vrdma_cq *cq)
{
	if (cq->cqn >= dev->attr.max_cq)
		return -EIO;
	cq->arm = dev->arm.base + (size_t)cq->cqn * VIRTIO_RDMA_ARM_STRIDE;
	return xa_err(xa_store_irq(&dev->cqs, cq->cqn, cq, GFP_KERNEL));
}

static void vrdma_cq_withdraw(struct vrdma_dev *dev, struct vrdma_cq *cq)
{
	xa_cmpxchg_irq(&dev->cqs, cq->cqn, cq, NULL, GFP_KERNEL);
	vrdma_cq_put(cq);
	wait_for_completion(&cq->idle);
}

static int vrdma_cq_respond(struct vrdma_cq *cq, struct ib_udata *udata)
{
	struct rxe_create_cq_resp resp = {};
	int ret;

	ret = vrdma_ring_map(cq->ring, udata, &resp.mi);
	if (ret)
		return ret;
	return ib_copy_to_udata(udata, &resp, sizeof(resp));
}

int vrdma_create_cq(struct ib_cq *ibcq, const struct ib_cq_init_attr *attr,
		    struct ib_udata *udata)
{
	struct vrdma_dev *dev = to_vdev(ibcq->device);
	struct vrdma_cq *cq = to_vcq(ibcq);
	int ret;

	if (attr->flags)
		return -EOPNOTSUPP;
	if ((udata && udata->outlen < sizeof(struct rxe_create_cq_resp)) || !attr->cqe ||
	    attr->cqe > dev->ibdev.attrs.max_cqe || attr->comp_vector >= dev->num_eventqs)
		return -EINVAL;

	refcount_set(&cq->ref, 1);
	init_completion(&cq->idle);
	spin_lock_init(&cq->lock);
	mutex_init(&cq->resize_lock);
	cq->ring = vrdma_cq_ring_create(dev, attr->cqe);
	if (!cq->ring)
		return -ENOMEM;
	ret = udata ? 0 : vrdma_ring_vmap(cq->ring);
	if (ret)
		goto err_ring;
	ret = vrdma_cq_create_on_device(dev, cq, attr->comp_vector);
	if (ret)
		goto err_ring;
	ret = vrdma_cq_publish(dev, cq);
	if (ret)
		goto err_undo;
	ret = udata ? vrdma_cq_respond(cq, udata) : 0;
	if (ret)
		goto err_withdraw;
	ibcq->cqe = cq->ring->entries - 1;
	return 0;

err_withdraw:
	vrdma_cq_withdraw(dev, cq);
err_undo:
	vrdma_ctrl_destroy(dev, VIRTIO_RDMA_CMD_DESTROY_CQ, cq->cqn);
err_ring:
	vrdma_ring_release(dev, cq->ring);
	return ret;
}

/* As the process sees it: what it makes of the indices is its own */
static u32 vrdma_cq_unpolled(const struct vrdma_ring *ring)
{
	const struct rxe_queue_buf *header = vrdma_ring_header(ring);

	return (READ_ONCE(header->producer_index) - READ_ONCE(header->consumer_index)) &
	       (ring->entries - 1);
}

/* Whoever arms the CQ looks at its ring */
static struct vrdma_ring *vrdma_cq_exchange(struct vrdma_cq *cq, struct vrdma_ring *ring)
{
	struct vrdma_ring *old = cq->ring;
	unsigned long flags;

	spin_lock_irqsave(&cq->lock, flags);
	cq->ring = ring;
	spin_unlock_irqrestore(&cq->lock, flags);
	cq->ibcq.cqe = ring->entries - 1;
	return old;
}

/*
 * The process gets another ring to map, and keeps its pollers out meanwhile. It is told before the
 * device is: after that nothing fails. A ring can hold more than was asked for, but what does not
 * fit into that is refused, as rxe does.
 */
int vrdma_resize_cq(struct ib_cq *ibcq, unsigned int cqe, struct ib_udata *udata)
{
	struct vrdma_dev *dev = to_vdev(ibcq->device);
	struct vrdma_cq *cq = to_vcq(ibcq);
	struct rxe_resize_cq_resp resp = {};
	struct vrdma_ring *ring;
	int ret;

	if (!udata)
		return -EOPNOTSUPP;
	if (udata->outlen < sizeof(resp) || !cqe || cqe > dev->ibdev.attrs.max_cqe)
		return -EINVAL;
	ring = vrdma_cq_ring_create(dev, cqe);
	if (!ring)
		return -ENOMEM;
	mutex_lock(&cq->resize_lock);
	ret = cqe < vrdma_cq_unpolled(cq->ring) ? -EINVAL : 0;
	if (!ret)
		ret = vrdma_ring_map(ring, udata, &resp.mi);
	if (!ret)
		ret = ib_copy_to_udata(udata, &resp, sizeof(resp));
	if (!ret)
		ret = vrdma_ring_exchange(dev, VIRTIO_RDMA_CMD_RESIZE_CQ, cq->cqn, ring);
	if (!ret)
		ring = vrdma_cq_exchange(cq, ring);
	mutex_unlock(&cq->resize_lock);
	vrdma_ring_release(dev, ring);
	return ret;
}

/*
 * An event may have queued the core's poll work after ib_free_cq() had cancelled it, which not
 * every kernel prevents. The CQ is withdrawn: nothing queues it again.
 */
static void vrdma_cq_stop_polling(struct ib_cq *ibcq)
{
	if (ibcq->poll_ctx == IB_POLL_WORKQUEUE || ibcq->poll_ctx == IB_POLL_UNBOUND_WORKQUEUE)
		cancel_work_sync(&ibcq->work);
}

/* The arm word is left clear for the next CQ with this number */
int vrdma_destroy_cq(struct ib_cq *ibcq, struct ib_udata *udata)
{
	struct vrdma_dev *dev = to_vdev(ibcq->device);
	struct vrdma_cq *cq = to_vcq(ibcq);

	vrdma_cq_withdraw(dev, cq);
	vrdma_cq_stop_polling(ibcq);
	WRITE_ONCE(*cq->arm, VIRTIO_RDMA_ARM_NONE);
	vrdma_ctrl_destroy(dev, VIRTIO_RDMA_CMD_DESTROY_CQ, cq->cqn);
	vrdma_ring_release(dev, cq->ring);
	return 0;
}

int vrdma_req_notify_cq(struct ib_cq *ibcq, enum ib_cq_notify_flags flags)
{
	struct vrdma_cq *cq = to_vcq(ibcq);
	struct rxe_queue_buf *header;
	unsigned long irq_flags;
	bool missed;

	vrdma_arm(cq->arm, (flags & IB_CQ_SOLICITED_MASK) == IB_CQ_SOLICITED);
	if (!(flags & IB_CQ_REPORT_MISSED_EVENTS))
		return 0;
	spin_lock_irqsave(&cq->lock, irq_flags);
	header = vrdma_ring_header(cq->ring);
	missed = READ_ONCE(header->producer_index) != READ_ONCE(header->consumer_index);
	spin_unlock_irqrestore(&cq->lock, irq_flags);
	return missed;
}
