// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * Queue pairs: creation, states. Work requests are the business of post.c.
 */
#include "vrdma.h"

static_assert(sizeof(struct rxe_send_wqe) == 208);
static_assert(sizeof(struct rxe_recv_wqe) == 40);

struct vrdma_qp *vrdma_qp_get(struct vrdma_dev *dev, u32 qpn)
{
	struct vrdma_qp *qp;
	unsigned long flags;

	xa_lock_irqsave(&dev->qps, flags);
	qp = xa_load(&dev->qps, qpn);
	if (qp && !refcount_inc_not_zero(&qp->ref))
		qp = NULL;
	xa_unlock_irqrestore(&dev->qps, flags);
	return qp;
}

void vrdma_qp_put(struct vrdma_qp *qp)
{
	if (refcount_dec_and_test(&qp->ref))
		complete(&qp->idle);
}

static int vrdma_qp_publish(struct vrdma_dev *dev, struct vrdma_qp *qp)
{
	return xa_err(xa_store_irq(&dev->qps, qp->ibqp.qp_num, qp, GFP_KERNEL));
}

static void vrdma_qp_withdraw(struct vrdma_dev *dev, struct vrdma_qp *qp)
{
	xa_cmpxchg_irq(&dev->qps, qp->ibqp.qp_num, qp, NULL, GFP_KERNEL);
	vrdma_qp_put(qp);
	wait_for_completion(&qp->idle);
}

static int vrdma_qp_check_init(struct vrdma_dev *dev, const struct ib_qp_init_attr *init)
{
	const struct ib_qp_cap *cap = &init->cap;
	const struct ib_device_attr *max = &dev->ibdev.attrs;

	if ((unsigned int)init->qp_type >= 32 || !(dev->attr.qp_types & BIT(init->qp_type)) ||
	    init->create_flags || init->xrcd || init->rwq_ind_tbl)
		return -EOPNOTSUPP;
	if (!init->send_cq || !init->recv_cq)
		return -EINVAL;
	if (cap->max_send_wr > max->max_qp_wr || cap->max_send_sge > max->max_send_sge ||
	    cap->max_inline_data > dev->attr.max_inline_data)
		return -EINVAL;
	if (init->srq)
		return 0;
	if (cap->max_recv_wr > max->max_qp_wr || cap->max_recv_sge > max->max_recv_sge)
		return -EINVAL;
	return 0;
}

/* The capabilities become what the rings have room for, which may be more than was asked for */
static int vrdma_qp_create_rings(struct vrdma_dev *dev, struct vrdma_qp *qp, bool shared)
{
	struct ib_qp_cap *cap = &qp->cap;
	u32 payload = max_t(u32, cap->max_send_sge * sizeof(struct rxe_sge), cap->max_inline_data);

	qp->sq = vrdma_ring_create(cap->max_send_wr, sizeof(struct rxe_send_wqe) + payload);
	if (!qp->sq)
		return -ENOMEM;
	cap->max_send_wr = qp->sq->entries - 1;
	cap->max_send_sge = min_t(u32, payload / sizeof(struct rxe_sge), dev->attr.max_sge);
	cap->max_inline_data = min(payload, dev->attr.max_inline_data);
	if (shared) {
		cap->max_recv_wr = 0;
		cap->max_recv_sge = 0;
		return 0;
	}
	qp->rq = vrdma_ring_create(cap->max_recv_wr, sizeof(struct rxe_recv_wqe) +
				   cap->max_recv_sge * sizeof(struct rxe_sge));
	if (!qp->rq)
		return -ENOMEM;
	cap->max_recv_wr = qp->rq->entries - 1;
	return 0;
}

static int vrdma_qp_vmap_rings(struct vrdma_qp *qp)
{
	int ret = vrdma_ring_vmap(qp->sq);

	return ret || !qp->rq ? ret : vrdma_ring_vmap(qp->rq);
}

static bool vrdma_qp_is_kernel(const struct vrdma_qp *qp)
{
	return qp->sq->header;
}

static void vrdma_qp_release_rings(struct vrdma_dev *dev, struct vrdma_qp *qp)
{
	vrdma_ring_release(dev, qp->sq);
	vrdma_ring_release(dev, qp->rq);
}

static void vrdma_qp_fill_request(struct vrdma_qp *qp, const struct ib_qp_init_attr *init,
				  struct vrdma_cmd *cmd)
{
	struct virtio_rdma_create_qp *req = vrdma_cmd_body(cmd);
	struct virtio_rdma_extent *extents = vrdma_cmd_extents(cmd);

	req->flags = cpu_to_le16(vrdma_qp_is_kernel(qp) ? VIRTIO_RDMA_QP_KERNEL : 0);
	req->pdn = cpu_to_le32(to_vpd(qp->ibqp.pd)->pdn);
	req->qp_type = init->qp_type;
	req->sq_sig_all = init->sq_sig_type == IB_SIGNAL_ALL_WR;
	req->send_cqn = cpu_to_le32(to_vcq(init->send_cq)->cqn);
	req->recv_cqn = cpu_to_le32(to_vcq(init->recv_cq)->cqn);
	req->srqn = cpu_to_le32(init->srq ? to_vsrq(init->srq)->srqn : VIRTIO_RDMA_NO_OBJECT);
	req->max_send_sge = cpu_to_le16(qp->cap.max_send_sge);
	req->max_recv_sge = cpu_to_le16(qp->cap.max_recv_sge);
	req->max_inline_data = cpu_to_le32(qp->cap.max_inline_data);
	vrdma_ring_describe(qp->sq, &req->sq);
	extents += vrdma_pages_extents(&qp->sq->mem, extents);
	if (!qp->rq)
		return;
	vrdma_ring_describe(qp->rq, &req->rq);
	vrdma_pages_extents(&qp->rq->mem, extents);
}

static int vrdma_qp_take_answer(struct vrdma_dev *dev, struct vrdma_qp *qp,
				const struct virtio_rdma_create_qp_resp *resp)
{
	u16 queue = le16_to_cpu(resp->doorbell_queue);

	qp->ibqp.qp_num = le32_to_cpu(resp->qpn);
	qp->doorbell = le32_to_cpu(resp->doorbell);
	if (queue >= dev->num_doorbellqs || qp->doorbell >= dev->attr.max_doorbells) {
		vrdma_ctrl_destroy(dev, VIRTIO_RDMA_CMD_DESTROY_QP, qp->ibqp.qp_num);
		return -EIO;
	}
	qp->dbq = &dev->doorbellqs[queue];
	return 0;
}

static int vrdma_qp_create_on_device(struct vrdma_dev *dev, struct vrdma_qp *qp,
				     const struct ib_qp_init_attr *init)
{
	u32 num = qp->sq->num_extents + (qp->rq ? qp->rq->num_extents : 0);
	struct vrdma_cmd *cmd;
	int ret;

	if (num > vrdma_cmd_max_extents(dev, sizeof(struct virtio_rdma_create_qp)))
		return -ENOMEM;
	cmd = vrdma_cmd_alloc(VIRTIO_RDMA_CMD_CREATE_QP, sizeof(struct virtio_rdma_create_qp),
			      num, sizeof(struct virtio_rdma_create_qp_resp));
	if (!cmd)
		return -ENOMEM;
	vrdma_qp_fill_request(qp, init, cmd);
	ret = vrdma_cmd_run(dev, cmd);
	if (!ret)
		ret = vrdma_qp_take_answer(dev, qp, vrdma_cmd_result(cmd));
	vrdma_cmd_free(dev, cmd);
	return ret;
}

static int vrdma_qp_respond(struct vrdma_qp *qp, struct ib_udata *udata)
{
	struct rxe_create_qp_resp resp = {};
	int ret;

	ret = vrdma_ring_map(qp->sq, udata, &resp.sq_mi);
	if (ret)
		return ret;
	if (qp->rq)
		ret = vrdma_ring_map(qp->rq, udata, &resp.rq_mi);
	if (ret)
		return ret;
	return ib_copy_to_udata(udata, &resp, sizeof(resp));
}

int vrdma_create_qp(struct ib_qp *ibqp, struct ib_qp_init_attr *init, struct ib_udata *udata)
{
	struct vrdma_dev *dev = to_vdev(ibqp->device);
	struct vrdma_qp *qp = to_vqp(ibqp);
	int ret;

	if (udata && (udata->inlen || udata->outlen < sizeof(struct rxe_create_qp_resp)))
		return -EINVAL;
	/* Management datagrams are the kernel's */
	if (udata && init->qp_type == IB_QPT_GSI)
		return -EOPNOTSUPP;
	ret = vrdma_qp_check_init(dev, init);
	if (ret)
		return ret;

	refcount_set(&qp->ref, 1);
	init_completion(&qp->idle);
	mutex_init(&qp->modify_lock);
	spin_lock_init(&qp->sq_lock);
	spin_lock_init(&qp->rq_lock);
	qp->state = IB_QPS_RESET;
	qp->sq_sig_type = init->sq_sig_type;
	qp->cap = init->cap;
	ret = vrdma_qp_create_rings(dev, qp, init->srq);
	if (ret)
		goto err_rings;
	ret = udata ? 0 : vrdma_qp_vmap_rings(qp);
	if (ret)
		goto err_rings;
	ret = vrdma_qp_create_on_device(dev, qp, init);
	if (ret)
		goto err_rings;
	ret = vrdma_qp_publish(dev, qp);
	if (ret)
		goto err_undo;
	ret = udata ? vrdma_qp_respond(qp, udata) : 0;
	if (ret)
		goto err_withdraw;
	init->cap = qp->cap;
	return 0;

err_withdraw:
	vrdma_qp_withdraw(dev, qp);
err_undo:
	vrdma_ctrl_destroy(dev, VIRTIO_RDMA_CMD_DESTROY_QP, ibqp->qp_num);
err_rings:
	vrdma_qp_release_rings(dev, qp);
	return ret;
}

int vrdma_destroy_qp(struct ib_qp *ibqp, struct ib_udata *udata)
{
	struct vrdma_dev *dev = to_vdev(ibqp->device);
	struct vrdma_qp *qp = to_vqp(ibqp);

	vrdma_ctrl_destroy(dev, VIRTIO_RDMA_CMD_DESTROY_QP, ibqp->qp_num);
	vrdma_qp_withdraw(dev, qp);
	if (vrdma_qp_is_kernel(qp))
		vrdma_dev_silence(dev);
	vrdma_qp_release_rings(dev, qp);
	return 0;
}

static int vrdma_av_to_wire(struct vrdma_dev *dev, const struct rdma_ah_attr *attr,
			    struct virtio_rdma_av *av)
{
	const struct ib_global_route *grh;

	if (!(rdma_ah_get_ah_flags(attr) & IB_AH_GRH))
		return -EINVAL;
	grh = rdma_ah_read_grh(attr);
	if (grh->sgid_index >= dev->attr.max_gids)
		return -EINVAL;
	memcpy(av->dgid, grh->dgid.raw, sizeof(av->dgid));
	av->flow_label = cpu_to_le32(grh->flow_label);
	av->sgid_index = cpu_to_le16(grh->sgid_index);
	av->hop_limit = grh->hop_limit;
	av->traffic_class = grh->traffic_class;
	av->sl = rdma_ah_get_sl(attr);
	return 0;
}

static void vrdma_av_from_wire(const struct virtio_rdma_av *av, u8 port_num,
			       struct rdma_ah_attr *attr)
{
	attr->type = RDMA_AH_ATTR_TYPE_ROCE;
	rdma_ah_set_port_num(attr, port_num);
	rdma_ah_set_sl(attr, av->sl);
	rdma_ah_set_grh(attr, NULL, le32_to_cpu(av->flow_label), le16_to_cpu(av->sgid_index),
			av->hop_limit, av->traffic_class);
	rdma_ah_set_dgid_raw(attr, (void *)av->dgid);
}

/* Attributes that the mask does not name stay zero */
static int vrdma_qp_attr_to_wire(struct vrdma_dev *dev, const struct ib_qp_attr *attr, int mask,
				 struct virtio_rdma_qp_attr *wire)
{
	if (mask & IB_QP_STATE)
		wire->qp_state = attr->qp_state;
	if (mask & IB_QP_CUR_STATE)
		wire->cur_qp_state = attr->cur_qp_state;
	if (mask & IB_QP_EN_SQD_ASYNC_NOTIFY)
		wire->en_sqd_async_notify = !!attr->en_sqd_async_notify;
	/* Programs allow here what they never use: what is not offered is left out */
	if (mask & IB_QP_ACCESS_FLAGS)
		wire->access_flags = cpu_to_le32(attr->qp_access_flags & dev->attr.access_flags);
	if (mask & IB_QP_PKEY_INDEX)
		wire->pkey_index = cpu_to_le16(attr->pkey_index);
	if (mask & IB_QP_PORT)
		wire->port_num = attr->port_num;
	if (mask & IB_QP_QKEY)
		wire->qkey = cpu_to_le32(attr->qkey);
	if (mask & IB_QP_PATH_MTU)
		wire->path_mtu = attr->path_mtu;
	if (mask & IB_QP_TIMEOUT)
		wire->timeout = attr->timeout;
	if (mask & IB_QP_RETRY_CNT)
		wire->retry_cnt = attr->retry_cnt;
	if (mask & IB_QP_RNR_RETRY)
		wire->rnr_retry = attr->rnr_retry;
	if (mask & IB_QP_RQ_PSN)
		wire->rq_psn = cpu_to_le32(attr->rq_psn & 0xffffff);
	if (mask & IB_QP_SQ_PSN)
		wire->sq_psn = cpu_to_le32(attr->sq_psn & 0xffffff);
	if (mask & IB_QP_MAX_QP_RD_ATOMIC)
		wire->max_rd_atomic = attr->max_rd_atomic;
	if (mask & IB_QP_MAX_DEST_RD_ATOMIC)
		wire->max_dest_rd_atomic = attr->max_dest_rd_atomic;
	if (mask & IB_QP_MIN_RNR_TIMER)
		wire->min_rnr_timer = attr->min_rnr_timer;
	if (mask & IB_QP_DEST_QPN)
		wire->dest_qpn = cpu_to_le32(attr->dest_qp_num);
	if (mask & IB_QP_AV)
		return vrdma_av_to_wire(dev, &attr->ah_attr, &wire->av);
	return 0;
}

static void vrdma_qp_attr_from_wire(const struct virtio_rdma_qp_attr *wire,
				    struct ib_qp_attr *attr)
{
	attr->qp_state = wire->qp_state;
	attr->cur_qp_state = wire->cur_qp_state;
	attr->path_mtu = wire->path_mtu;
	attr->sq_draining = wire->sq_draining;
	attr->qkey = le32_to_cpu(wire->qkey);
	attr->rq_psn = le32_to_cpu(wire->rq_psn);
	attr->sq_psn = le32_to_cpu(wire->sq_psn);
	attr->dest_qp_num = le32_to_cpu(wire->dest_qpn);
	attr->qp_access_flags = le32_to_cpu(wire->access_flags);
	attr->pkey_index = le16_to_cpu(wire->pkey_index);
	attr->port_num = wire->port_num;
	attr->max_rd_atomic = wire->max_rd_atomic;
	attr->max_dest_rd_atomic = wire->max_dest_rd_atomic;
	attr->min_rnr_timer = wire->min_rnr_timer;
	attr->timeout = wire->timeout;
	attr->retry_cnt = wire->retry_cnt;
	attr->rnr_retry = wire->rnr_retry;
	attr->en_sqd_async_notify = wire->en_sqd_async_notify;
	attr->path_mig_state = IB_MIG_MIGRATED;
	vrdma_av_from_wire(&wire->av, wire->port_num, &attr->ah_attr);
}

/* Who posts beside this has either posted before it, or sees the new state */
static void vrdma_qp_set_state(struct vrdma_qp *qp, enum ib_qp_state state)
{
	spin_lock_irq(&qp->sq_lock);
	spin_lock(&qp->rq_lock);
	qp->state = state;
	if (state == IB_QPS_RESET)
		qp->failed = false;
	spin_unlock(&qp->rq_lock);
	spin_unlock_irq(&qp->sq_lock);
}

/*
 * States that the driver enters before the device does. RESET empties the rings: a request that is
 * posted after that would publish an index of before. ERR flushes them: a receive that is posted
 * after that needs the doorbell.
 */
static bool vrdma_qp_ends(enum ib_qp_state next)
{
	return next == IB_QPS_RESET || next == IB_QPS_ERR;
}

int vrdma_modify_qp(struct ib_qp *ibqp, struct ib_qp_attr *attr, int mask,
		    struct ib_udata *udata)
{
	struct vrdma_dev *dev = to_vdev(ibqp->device);
	struct virtio_rdma_modify_qp req = {};
	struct vrdma_qp *qp = to_vqp(ibqp);
	enum ib_qp_state before, cur, next;
	int ret;

	if (mask & ~IB_QP_ATTR_STANDARD_BITS)
		return -EOPNOTSUPP;
	req.qpn = cpu_to_le32(ibqp->qp_num);
	req.attr_mask = cpu_to_le32(mask);
	ret = vrdma_qp_attr_to_wire(dev, attr, mask, &req.attr);
	if (ret)
		return ret;

	mutex_lock(&qp->modify_lock);
	before = qp->state;
	cur = mask & IB_QP_CUR_STATE ? attr->cur_qp_state : before;
	next = mask & IB_QP_STATE ? attr->qp_state : cur;
	if (ib_modify_qp_is_ok(cur, next, ibqp->qp_type, mask)) {
		if (vrdma_qp_ends(next))
			vrdma_qp_set_state(qp, next);
		ret = vrdma_ctrl_call(dev, VIRTIO_RDMA_CMD_MODIFY_QP, &req, sizeof(req), NULL, 0);
		vrdma_qp_set_state(qp, ret ? before : next);
	} else {
		ret = -EINVAL;
	}
	mutex_unlock(&qp->modify_lock);
	/* Whoever drains a QP frees its memory next */
	if (ret && vrdma_qp_is_kernel(qp))
		vrdma_dev_silence(dev);
	return ret;
}

int vrdma_query_qp(struct ib_qp *ibqp, struct ib_qp_attr *attr, int mask,
		   struct ib_qp_init_attr *init)
{
	struct vrdma_dev *dev = to_vdev(ibqp->device);
	struct virtio_rdma_object_req req = { .number = cpu_to_le32(ibqp->qp_num) };
	struct virtio_rdma_qp_attr wire;
	struct vrdma_qp *qp = to_vqp(ibqp);
	int ret;

	mutex_lock(&qp->modify_lock);
	ret = vrdma_ctrl_call(dev, VIRTIO_RDMA_CMD_QUERY_QP, &req, sizeof(req), &wire,
			      sizeof(wire));
	if (!ret)
		vrdma_qp_set_state(qp, wire.qp_state);
	mutex_unlock(&qp->modify_lock);
	if (ret)
		return ret;

	memset(attr, 0, sizeof(*attr));
	memset(init, 0, sizeof(*init));
	vrdma_qp_attr_from_wire(&wire, attr);
	attr->cap = qp->cap;
	init->event_handler = ibqp->event_handler;
	init->qp_context = ibqp->qp_context;
	init->send_cq = ibqp->send_cq;
	init->recv_cq = ibqp->recv_cq;
	init->srq = ibqp->srq;
	init->cap = qp->cap;
	init->sq_sig_type = qp->sq_sig_type;
	init->qp_type = ibqp->qp_type;
	init->port_num = VRDMA_PORT;
	return 0;
}
