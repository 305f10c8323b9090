// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * Memory windows. Processes bind them with work requests, whose keys the driver does not follow:
 * the device knows a window by the part of its key that stays.
 */
#include "vrdma.h"

int vrdma_alloc_mw(struct ib_mw *ibmw, struct ib_udata *udata)
{
	struct vrdma_dev *dev = to_vdev(ibmw->device);
	struct virtio_rdma_alloc_mw req = {
		.pdn = cpu_to_le32(to_vpd(ibmw->pd)->pdn),
		.kind = ibmw->type == IB_MW_TYPE_1 ? VIRTIO_RDMA_MW_TYPE_1 :
						     VIRTIO_RDMA_MW_TYPE_2,
	};
	struct virtio_rdma_object_resp resp;
	int ret;

	ret = vrdma_ctrl_call(dev, VIRTIO_RDMA_CMD_ALLOC_MW, &req, sizeof(req), &resp,
			      sizeof(resp));
	if (ret)
		return ret;
	ibmw->rkey = le32_to_cpu(resp.number);
	return 0;
}

int vrdma_dealloc_mw(struct ib_mw *ibmw)
{
	vrdma_ctrl_destroy(to_vdev(ibmw->device), VIRTIO_RDMA_CMD_DEALLOC_MW, ibmw->rkey);
	return 0;
}
