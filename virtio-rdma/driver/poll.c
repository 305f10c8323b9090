// SPDX-License-Identifier: GPL-2.0 OR MIT
/* Completions for users in the kernel, in any context. Processes read their rings themselves. */
#include <linux/rcupdate.h>

#include "kring.h"
#include "vrdma.h"

/*
 * The QP is not looked at, which a user may be about to destroy. One that is gone has no
 * completions any more.
 */
static struct ib_qp *vrdma_wc_qp(struct vrdma_dev *dev, u32 qpn)
{
	struct vrdma_qp *qp = xa_load(&dev->qps, qpn);

	return qp ? &qp->ibqp : NULL;
}

/* Where the numbers of the user ABI are not those of the kernel */
static enum ib_wc_opcode vrdma_wc_opcode(u32 wire)
{
	return wire == VIRTIO_RDMA_WC_REG_MR ? IB_WC_REG_MR : wire;
}

static int vrdma_wc_flags(u32 wire)
{
	int flags = wire & (IB_WC_GRH | IB_WC_WITH_IMM);

	static_assert(IB_WC_GRH == VIRTIO_RDMA_WC_GRH);
	static_assert(IB_WC_WITH_IMM == VIRTIO_RDMA_WC_WITH_IMM);
	return wire & VIRTIO_RDMA_WC_WITH_INV ? flags | IB_WC_WITH_INVALIDATE : flags;
}

/* In front of a datagram is a network header, of which the service level tells the type */
static void vrdma_wc_network_header(u8 sl, struct ib_wc *wc)
{
	switch (sl) {
	case VIRTIO_RDMA_SL_ROCE_V2_IPV6:
		wc->network_hdr_type = RDMA_NETWORK_IPV6;
		break;
	case VIRTIO_RDMA_SL_ROCE_V2_IPV4:
		wc->network_hdr_type = RDMA_NETWORK_IPV4;
		break;
	default:
		return;
	}
	wc->wc_flags |= IB_WC_WITH_NETWORK_HDR_TYPE;
}

static bool vrdma_wc_fill(struct vrdma_dev *dev, const struct ib_uverbs_wc *cqe, struct ib_wc *wc)
{
	memset(wc, 0, sizeof(*wc));
	wc->qp = vrdma_wc_qp(dev, cqe->qp_num);
	if (!wc->qp)
		return false;
	wc->wr_id = cqe->wr_id;
	wc->status = cqe->status;
	if (wc->status != IB_WC_SUCCESS)
		vrdma_qp_failed(dev, cqe->qp_num);
	wc->opcode = vrdma_wc_opcode(cqe->opcode);
	wc->vendor_err = cqe->vendor_err;
	wc->byte_len = cqe->byte_len;
	wc->ex.imm_data = (__force __be32)cqe->ex.imm_data;
	wc->src_qp = cqe->src_qp;
	wc->wc_flags = vrdma_wc_flags(cqe->wc_flags);
	wc->port_num = VRDMA_PORT;
	if (wc->wc_flags & IB_WC_GRH)
		vrdma_wc_network_header(cqe->sl, wc);
	return true;
}

int vrdma_poll_cq(struct ib_cq *ibcq, int num, struct ib_wc *wc)
{
	struct vrdma_dev *dev = to_vdev(ibcq->device);
	struct vrdma_cq *cq = to_vcq(ibcq);
	struct vrdma_ring *ring;
	u32 index, producer;
	unsigned long flags;
	int taken = 0;

	spin_lock_irqsave(&cq->lock, flags);
	ring = cq->ring;
	if (!ring->header) {
		spin_unlock_irqrestore(&cq->lock, flags);
		return -EINVAL;
	}
	index = vrdma_ring_consumer(ring);
	producer = vrdma_ring_producer(ring);
	for (; taken < num && index != producer; index = vrdma_ring_next(ring, index))
		taken += vrdma_wc_fill(dev, vrdma_ring_element(ring, index), &wc[taken]);
	vrdma_ring_taken(ring, index);
	spin_unlock_irqrestore(&cq->lock, flags);
	return taken;
}
