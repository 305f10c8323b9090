// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * Multicast groups. The device carries multicast datagrams itself: the network interface beside it
 * needs to know nothing of them.
 */
#include "vrdma.h"

static struct virtio_rdma_mcast vrdma_mcast_request(const struct ib_qp *ibqp,
						    const union ib_gid *gid)
{
	struct virtio_rdma_mcast req = { .qpn = cpu_to_le32(ibqp->qp_num) };

	memcpy(req.mgid, gid->raw, sizeof(req.mgid));
	return req;
}

int vrdma_attach_mcast(struct ib_qp *ibqp, union ib_gid *gid, u16 lid)
{
	struct virtio_rdma_mcast req = vrdma_mcast_request(ibqp, gid);

	return vrdma_ctrl_call(to_vdev(ibqp->device), VIRTIO_RDMA_CMD_ATTACH_MCAST, &req,
			       sizeof(req), NULL, 0);
}

int vrdma_detach_mcast(struct ib_qp *ibqp, union ib_gid *gid, u16 lid)
{
	struct virtio_rdma_mcast req = vrdma_mcast_request(ibqp, gid);
	struct vrdma_dev *dev = to_vdev(ibqp->device);
	int ret;

	ret = vrdma_ctrl_call(dev, VIRTIO_RDMA_CMD_DETACH_MCAST, &req, sizeof(req), NULL, 0);
	/* The core keeps QPs that are in a group: those of a dead device are not */
	return vrdma_is_dead(dev) ? 0 : ret;
}
