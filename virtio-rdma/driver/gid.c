// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * The GID table. The core keeps it, from the addresses of the network interface; the device
 * refuses those that the virtual NIC was not given, which then do not appear.
 */
#include "vrdma.h"

int vrdma_add_gid(const struct ib_gid_attr *attr, void **context)
{
	struct vrdma_dev *dev = to_vdev(attr->device);
	struct virtio_rdma_add_gid req = {
		.index = cpu_to_le16(attr->index),
	};

	switch (attr->gid_type) {
	case IB_GID_TYPE_ROCE:
		req.roce_version = 1;
		break;
	case IB_GID_TYPE_ROCE_UDP_ENCAP:
		req.roce_version = 2;
		break;
	default:
		return -EINVAL;
	}
	memcpy(req.gid, attr->gid.raw, sizeof(req.gid));
	return vrdma_ctrl_call(dev, VIRTIO_RDMA_CMD_ADD_GID, &req, sizeof(req), NULL, 0);
}

int vrdma_del_gid(const struct ib_gid_attr *attr, void **context)
{
	struct vrdma_dev *dev = to_vdev(attr->device);
	struct virtio_rdma_del_gid req = {
		.index = cpu_to_le16(attr->index),
	};

	return vrdma_ctrl_call(dev, VIRTIO_RDMA_CMD_DEL_GID, &req, sizeof(req), NULL, 0);
}
