// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * Posting. A process writes its work requests into the ring itself and calls for the doorbell at
 * most; users in the kernel come here, in any context.
 *
 * The core gives them kernel addresses where other devices get those of DMA (ib_uses_virt_dma).
 * With the key of all memory the device wants guest-physical ones.
 */
#include <linux/io.h>

#include "doorbell.h"
#include "kring.h"
#include "vrdma.h"

static bool vrdma_is_datagram(const struct vrdma_qp *qp)
{
	return qp->ibqp.qp_type == IB_QPT_UD || qp->ibqp.qp_type == IB_QPT_GSI;
}

/* Writes the SGEs and returns the bytes of all */
static u32 vrdma_fill_sges(struct rxe_sge *out, const struct ib_pd *pd, const struct ib_sge *sges,
			   int num)
{
	u32 length = 0;
	int i;

	for (i = 0; i < num; i++) {
		out[i].addr = sges[i].addr;
		out[i].length = sges[i].length;
		out[i].lkey = sges[i].lkey;
		if (sges[i].length && sges[i].lkey == pd->local_dma_lkey)
			out[i].addr = virt_to_phys((void *)(uintptr_t)sges[i].addr);
		length += sges[i].length;
	}
	return length;
}

static int vrdma_fill_inline(struct vrdma_qp *qp, struct rxe_send_wqe *wqe,
			     const struct ib_send_wr *wr)
{
	u32 length = 0;
	int i;

	for (i = 0; i < wr->num_sge; i++) {
		const struct ib_sge *sge = &wr->sg_list[i];

		if (sge->length > qp->cap.max_inline_data - length)
			return -EINVAL;
		memcpy(wqe->dma.inline_data + length, (void *)(uintptr_t)sge->addr, sge->length);
		length += sge->length;
	}
	wqe->dma.length = length;
	return 0;
}

static int vrdma_fill_datagram(struct rxe_send_wr *out, const struct ib_send_wr *wr)
{
	const struct ib_ud_wr *ud = ud_wr(wr);

	if (wr->opcode != IB_WR_SEND && wr->opcode != IB_WR_SEND_WITH_IMM)
		return -EINVAL;
	out->ex.imm_data = wr->ex.imm_data;
	out->wr.ud.remote_qpn = ud->remote_qpn;
	out->wr.ud.remote_qkey = ud->remote_qkey;
	out->wr.ud.pkey_index = ud->pkey_index;
	out->wr.ud.ah_num = to_vah(ud->ah)->num;
	return 0;
}

static void vrdma_fill_reg(struct rxe_send_wr *out, const struct ib_reg_wr *wr)
{
	struct virtio_rdma_reg_wr *reg = (void *)&out->wr;
	const struct vrdma_mr *mr = to_vmr(wr->mr);

	BUILD_BUG_ON(sizeof(*reg) > sizeof(out->wr));
	out->opcode = VIRTIO_RDMA_WR_REG_MR;
	reg->extents = cpu_to_le64(virt_to_phys(mr->extents));
	reg->iova = cpu_to_le64(mr->ibmr.iova);
	reg->length = cpu_to_le64(mr->ibmr.length);
	reg->key = cpu_to_le32(wr->key);
	reg->access = cpu_to_le32(wr->access & to_vdev(wr->mr->device)->attr.access_flags);
	reg->num_extents = cpu_to_le32(mr->num_extents);
	reg->reserved = 0;
}

static int vrdma_fill_connected(struct rxe_send_wr *out, const struct ib_send_wr *wr)
{
	switch (wr->opcode) {
	case IB_WR_RDMA_WRITE_WITH_IMM:
		out->ex.imm_data = wr->ex.imm_data;
		fallthrough;
	case IB_WR_RDMA_WRITE:
	case IB_WR_RDMA_READ:
		out->wr.rdma.remote_addr = rdma_wr(wr)->remote_addr;
		out->wr.rdma.rkey = rdma_wr(wr)->rkey;
		return 0;
	case IB_WR_SEND_WITH_IMM:
		out->ex.imm_data = wr->ex.imm_data;
		return 0;
	case IB_WR_SEND:
		return 0;
	case IB_WR_SEND_WITH_INV:
	case IB_WR_LOCAL_INV:
		out->ex.invalidate_rkey = wr->ex.invalidate_rkey;
		return 0;
	case IB_WR_REG_MR:
		vrdma_fill_reg(out, reg_wr(wr));
		return 0;
	case IB_WR_ATOMIC_CMP_AND_SWP:
	case IB_WR_ATOMIC_FETCH_AND_ADD:
		out->wr.atomic.remote_addr = atomic_wr(wr)->remote_addr;
		out->wr.atomic.compare_add = atomic_wr(wr)->compare_add;
		out->wr.atomic.swap = atomic_wr(wr)->swap;
		out->wr.atomic.rkey = atomic_wr(wr)->rkey;
		return 0;
	default:
		return -EINVAL;
	}
}

static int vrdma_fill_send(struct vrdma_qp *qp, struct rxe_send_wqe *wqe,
			   const struct ib_send_wr *wr)
{
	int ret;

	if (wr->num_sge > qp->cap.max_send_sge)
		return -EINVAL;
	wqe->wr.wr_id = wr->wr_id;
	wqe->wr.opcode = wr->opcode;
	wqe->wr.send_flags = wr->send_flags & (IB_SEND_FENCE | IB_SEND_SIGNALED |
					       IB_SEND_SOLICITED | IB_SEND_INLINE);
	ret = vrdma_is_datagram(qp) ? vrdma_fill_datagram(&wqe->wr, wr) :
				      vrdma_fill_connected(&wqe->wr, wr);
	if (ret)
		return ret;
	wqe->dma.num_sge = wr->num_sge;
	if (wr->send_flags & IB_SEND_INLINE)
		return vrdma_fill_inline(qp, wqe, wr);
	wqe->dma.length = vrdma_fill_sges(wqe->dma.sge, qp->ibqp.pd, wr->sg_list, wr->num_sge);
	return 0;
}

/* Writes as many as there is room for; what could not be posted is @bad_wr */
static int vrdma_write_sends(struct vrdma_qp *qp, const struct ib_send_wr *wr,
			     const struct ib_send_wr **bad_wr)
{
	u32 index = vrdma_ring_producer(qp->sq);
	int ret = 0;

	for (; wr; wr = wr->next) {
		u32 next = vrdma_ring_next(qp->sq, index);

		if (next == vrdma_ring_consumer(qp->sq))
			ret = -ENOMEM;
		else
			ret = vrdma_fill_send(qp, vrdma_ring_element(qp->sq, index), wr);
		if (ret) {
			*bad_wr = wr;
			break;
		}
		index = next;
	}
	vrdma_ring_publish(qp->sq, index);
	return ret;
}

/* Without work requests: the doorbell of a process */
int vrdma_post_send(struct ib_qp *ibqp, const struct ib_send_wr *wr,
		    const struct ib_send_wr **bad_wr)
{
	struct vrdma_qp *qp = to_vqp(ibqp);
	unsigned long flags;
	bool ready;
	int ret = 0;

	*bad_wr = wr;
	if (wr && !qp->sq->header)
		return -EOPNOTSUPP;
	spin_lock_irqsave(&qp->sq_lock, flags);
	ready = qp->state >= IB_QPS_RTS;
	if (ready && wr)
		ret = vrdma_write_sends(qp, wr, bad_wr);
	spin_unlock_irqrestore(&qp->sq_lock, flags);
	if (!ready)
		return -EINVAL;
	vrdma_doorbell_ring(qp->dbq, qp->doorbell);
	return ret;
}

static int vrdma_fill_recv(struct vrdma_ring *ring, u32 index, const struct ib_pd *pd, u32 max_sge,
			   const struct ib_recv_wr *wr)
{
	struct rxe_recv_wqe *wqe = vrdma_ring_element(ring, index);

	if (wr->num_sge > max_sge)
		return -EINVAL;
	wqe->wr_id = wr->wr_id;
	wqe->dma.num_sge = wr->num_sge;
	wqe->dma.length = vrdma_fill_sges(wqe->dma.sge, pd, wr->sg_list, wr->num_sge);
	return 0;
}

static int vrdma_write_recvs(struct vrdma_ring *ring, const struct ib_pd *pd, u32 max_sge,
			     const struct ib_recv_wr *wr, const struct ib_recv_wr **bad_wr)
{
	u32 index = vrdma_ring_producer(ring);
	int ret = 0;

	for (; wr; wr = wr->next) {
		u32 next = vrdma_ring_next(ring, index);

		if (next == vrdma_ring_consumer(ring))
			ret = -ENOMEM;
		else
			ret = vrdma_fill_recv(ring, index, pd, max_sge, wr);
		if (ret) {
			*bad_wr = wr;
			break;
		}
		index = next;
	}
	vrdma_ring_publish(ring, index);
	return ret;
}

/*
 * A receive of a QP in error is to be flushed, on which ib_drain_rq() waits. The device does not
 * look at receives by itself.
 */
static bool vrdma_flushes(const struct vrdma_qp *qp, enum ib_qp_state state)
{
	/* After the receive, as vrdma_qp_failed() rings the doorbell after the flag */
	smp_mb();
	return state == IB_QPS_ERR || READ_ONCE(qp->failed);
}

/* The receives posted so far are flushed, and those to come. Called for each failed completion. */
void vrdma_qp_failed(struct vrdma_dev *dev, u32 qpn)
{
	struct vrdma_qp *qp = vrdma_qp_get(dev, qpn);

	if (!qp)
		return;
	if (qp->rq && !READ_ONCE(qp->failed)) {
		WRITE_ONCE(qp->failed, true);
		vrdma_doorbell_ring(qp->dbq, qp->doorbell);
	}
	vrdma_qp_put(qp);
}

int vrdma_post_recv(struct ib_qp *ibqp, const struct ib_recv_wr *wr,
		    const struct ib_recv_wr **bad_wr)
{
	struct vrdma_qp *qp = to_vqp(ibqp);
	enum ib_qp_state state;
	unsigned long flags;
	int ret = -EINVAL;

	*bad_wr = wr;
	if (!qp->rq || !qp->rq->header)
		return ret;
	spin_lock_irqsave(&qp->rq_lock, flags);
	state = qp->state;
	if (state >= IB_QPS_INIT)
		ret = vrdma_write_recvs(qp->rq, ibqp->pd, qp->cap.max_recv_sge, wr, bad_wr);
	spin_unlock_irqrestore(&qp->rq_lock, flags);
	if (vrdma_flushes(qp, state))
		vrdma_doorbell_ring(qp->dbq, qp->doorbell);
	return ret;
}

int vrdma_post_srq_recv(struct ib_srq *ibsrq, const struct ib_recv_wr *wr,
			const struct ib_recv_wr **bad_wr)
{
	struct vrdma_srq *srq = to_vsrq(ibsrq);
	unsigned long flags;
	int ret;

	if (!srq->ring->header) {
		*bad_wr = wr;
		return -EINVAL;
	}
	spin_lock_irqsave(&srq->lock, flags);
	ret = vrdma_write_recvs(srq->ring, ibsrq->pd, srq->max_sge, wr, bad_wr);
	spin_unlock_irqrestore(&srq->lock, flags);
	return ret;
}
