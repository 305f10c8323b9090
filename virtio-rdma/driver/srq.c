// SPDX-License-Identifier: GPL-2.0 OR MIT
/* Shared receive queues. Receives are posted by writing the ring, by processes without a call. */
#include "vrdma.h"

struct vrdma_srq *vrdma_srq_get(struct vrdma_dev *dev, u32 srqn)
{
	struct vrdma_srq *srq;
	unsigned long flags;

	xa_lock_irqsave(&dev->srqs, flags);
	srq = xa_load(&dev->srqs, srqn);
	if (srq && !refcount_inc_not_zero(&srq->ref))
		srq = NULL;
	xa_unlock_irqrestore(&dev->srqs, flags);
	return srq;
}

void vrdma_srq_put(struct vrdma_srq *srq)
{
	if (refcount_dec_and_test(&srq->ref))
		complete(&srq->idle);
}

static int vrdma_srq_publish(struct vrdma_dev *dev, struct vrdma_srq *srq)
{
	return xa_err(xa_store_irq(&dev->srqs, srq->srqn, srq, GFP_KERNEL));
}

static void vrdma_srq_withdraw(struct vrdma_dev *dev, struct vrdma_srq *srq)
{
	xa_cmpxchg_irq(&dev->srqs, srq->srqn, srq, NULL, GFP_KERNEL);
	vrdma_srq_put(srq);
	wait_for_completion(&srq->idle);
}

static int vrdma_srq_check_init(const struct vrdma_dev *dev, const struct ib_srq_init_attr *init)
{
	const struct ib_device_attr *max = &dev->ibdev.attrs;
	const struct ib_srq_attr *attr = &init->attr;

	if (init->srq_type != IB_SRQT_BASIC)
		return -EOPNOTSUPP;
	if (!attr->max_wr || attr->max_wr > max->max_srq_wr || attr->max_sge > max->max_srq_sge ||
	    attr->srq_limit > attr->max_wr)
		return -EINVAL;
	return 0;
}

static int vrdma_srq_create_on_device(struct vrdma_dev *dev, struct vrdma_srq *srq, u32 limit)
{
	const struct virtio_rdma_object_resp *resp;
	struct virtio_rdma_create_srq *req;
	struct vrdma_cmd *cmd;
	int ret;

	if (srq->ring->num_extents > vrdma_cmd_max_extents(dev, sizeof(*req)))
		return -ENOMEM;
	cmd = vrdma_cmd_alloc(VIRTIO_RDMA_CMD_CREATE_SRQ, sizeof(*req), srq->ring->num_extents,
			      sizeof(*resp));
	if (!cmd)
		return -ENOMEM;
	req = vrdma_cmd_body(cmd);
	req->pdn = cpu_to_le32(to_vpd(srq->ibsrq.pd)->pdn);
	req->max_sge = cpu_to_le16(srq->max_sge);
	req->limit = cpu_to_le32(limit);
	vrdma_ring_describe(srq->ring, &req->ring);
	vrdma_pages_extents(&srq->ring->mem, vrdma_cmd_extents(cmd));
	ret = vrdma_cmd_run(dev, cmd);
	if (!ret) {
		resp = vrdma_cmd_result(cmd);
		srq->srqn = le32_to_cpu(resp->number);
	}
	vrdma_cmd_free(dev, cmd);
	return ret;
}

static int vrdma_srq_respond(struct vrdma_srq *srq, struct ib_udata *udata)
{
	struct rxe_create_srq_resp resp = { .srq_num = srq->srqn };
	int ret;

	ret = vrdma_ring_map(srq->ring, udata, &resp.mi);
	if (ret)
		return ret;
	return ib_copy_to_udata(udata, &resp, sizeof(resp));
}

int vrdma_create_srq(struct ib_srq *ibsrq, struct ib_srq_init_attr *init, struct ib_udata *udata)
{
	struct vrdma_dev *dev = to_vdev(ibsrq->device);
	struct vrdma_srq *srq = to_vsrq(ibsrq);
	int ret;

	if (udata && udata->outlen < sizeof(struct rxe_create_srq_resp))
		return -EINVAL;
	ret = vrdma_srq_check_init(dev, init);
	if (ret)
		return ret;

	refcount_set(&srq->ref, 1);
	init_completion(&srq->idle);
	spin_lock_init(&srq->lock);
	mutex_init(&srq->resize_lock);
	srq->max_sge = init->attr.max_sge;
	srq->ring = vrdma_ring_create(init->attr.max_wr, sizeof(struct rxe_recv_wqe) +
				      srq->max_sge * sizeof(struct rxe_sge));
	if (!srq->ring)
		return -ENOMEM;
	ret = udata ? 0 : vrdma_ring_vmap(srq->ring);
	if (ret)
		goto err_ring;
	ret = vrdma_srq_create_on_device(dev, srq, init->attr.srq_limit);
	if (ret)
		goto err_ring;
	ret = vrdma_srq_publish(dev, srq);
	if (ret)
		goto err_undo;
	ret = udata ? vrdma_srq_respond(srq, udata) : 0;
	if (ret)
		goto err_withdraw;
	init->attr.max_wr = srq->ring->entries - 1;
	return 0;

err_withdraw:
	vrdma_srq_withdraw(dev, srq);
err_undo:
	vrdma_ctrl_destroy(dev, VIRTIO_RDMA_CMD_DESTROY_SRQ, srq->srqn);
err_ring:
	vrdma_ring_release(dev, srq->ring);
	return ret;
}

int vrdma_destroy_srq(struct ib_srq *ibsrq, struct ib_udata *udata)
{
	struct vrdma_dev *dev = to_vdev(ibsrq->device);
	struct vrdma_srq *srq = to_vsrq(ibsrq);

	vrdma_ctrl_destroy(dev, VIRTIO_RDMA_CMD_DESTROY_SRQ, srq->srqn);
	vrdma_srq_withdraw(dev, srq);
	if (srq->ring->header)
		vrdma_dev_silence(dev);
	vrdma_ring_release(dev, srq->ring);
	return 0;
}

/* The provider does not take the answer where answers go, but has its address in the request */
static int vrdma_srq_tell_ring(struct vrdma_ring *ring, struct ib_udata *udata)
{
	struct rxe_modify_srq_cmd cmd;
	struct mminfo info = {};
	int ret;

	ret = ib_copy_from_udata(&cmd, udata, sizeof(cmd));
	if (ret)
		return ret;
	ret = vrdma_ring_map(ring, udata, &info);
	if (ret)
		return ret;
	if (copy_to_user(u64_to_user_ptr(cmd.mmap_info_addr), &info, sizeof(info)))
		return -EFAULT;
	return 0;
}

/*
 * The process gets another ring to map, and keeps its posters out meanwhile. It is told before the
 * device is: after that nothing fails. Under the lock of the ring.
 */
static int vrdma_srq_resize(struct vrdma_dev *dev, struct vrdma_srq *srq, u32 max_wr,
			    struct ib_udata *udata)
{
	struct vrdma_ring *ring;
	int ret;

	if (!udata)
		return -EOPNOTSUPP;
	if (udata->inlen < sizeof(struct rxe_modify_srq_cmd) || !max_wr ||
	    max_wr > dev->ibdev.attrs.max_srq_wr)
		return -EINVAL;
	ring = vrdma_ring_create(max_wr, sizeof(struct rxe_recv_wqe) +
				 srq->max_sge * sizeof(struct rxe_sge));
	if (!ring)
		return -ENOMEM;
	ret = vrdma_srq_tell_ring(ring, udata);
	if (!ret)
		ret = vrdma_ring_exchange(dev, VIRTIO_RDMA_CMD_RESIZE_SRQ, srq->srqn, ring);
	if (!ret)
		swap(srq->ring, ring);
	vrdma_ring_release(dev, ring);
	return ret;
}

static int vrdma_srq_set_limit(struct vrdma_dev *dev, struct vrdma_srq *srq, u32 limit)
{
	struct virtio_rdma_modify_srq req = {
		.srqn = cpu_to_le32(srq->srqn),
		.limit = cpu_to_le32(limit),
	};

	return vrdma_ctrl_call(dev, VIRTIO_RDMA_CMD_MODIFY_SRQ, &req, sizeof(req), NULL, 0);
}

/* What a limit is held to, before anything is changed: the size that was asked for, as it counts */
static u32 vrdma_srq_room(const struct vrdma_srq *srq, const struct ib_srq_attr *attr, int mask)
{
	return mask & IB_SRQ_MAX_WR ? attr->max_wr : srq->ring->entries - 1;
}

int vrdma_modify_srq(struct ib_srq *ibsrq, struct ib_srq_attr *attr, enum ib_srq_attr_mask mask,
		     struct ib_udata *udata)
{
	struct vrdma_dev *dev = to_vdev(ibsrq->device);
	struct vrdma_srq *srq = to_vsrq(ibsrq);
	int ret = 0;

	mutex_lock(&srq->resize_lock);
	if ((mask & IB_SRQ_LIMIT) && attr->srq_limit > vrdma_srq_room(srq, attr, mask))
		ret = -EINVAL;
	if (!ret && (mask & IB_SRQ_MAX_WR))
		ret = vrdma_srq_resize(dev, srq, attr->max_wr, udata);
	if (!ret && (mask & IB_SRQ_LIMIT))
		ret = vrdma_srq_set_limit(dev, srq, attr->srq_limit);
	mutex_unlock(&srq->resize_lock);
	return ret;
}

int vrdma_query_srq(struct ib_srq *ibsrq, struct ib_srq_attr *attr)
{
	struct vrdma_srq *srq = to_vsrq(ibsrq);
	struct virtio_rdma_object_req req = { .number = cpu_to_le32(srq->srqn) };
	struct virtio_rdma_srq_attr wire;
	int ret;

	ret = vrdma_ctrl_call(to_vdev(ibsrq->device), VIRTIO_RDMA_CMD_QUERY_SRQ, &req,
			      sizeof(req), &wire, sizeof(wire));
	if (ret)
		return ret;
	mutex_lock(&srq->resize_lock);
	attr->max_wr = srq->ring->entries - 1;
	mutex_unlock(&srq->resize_lock);
	attr->max_sge = srq->max_sge;
	attr->srq_limit = le32_to_cpu(wire.limit);
	return 0;
}
