// SPDX-License-Identifier: GPL-2.0 OR MIT
/* Protection domains. */
#include "vrdma.h"

int vrdma_alloc_pd(struct ib_pd *ibpd, struct ib_udata *udata)
{
	struct vrdma_dev *dev = to_vdev(ibpd->device);
	struct virtio_rdma_object_resp resp;
	int ret;

	ret = vrdma_ctrl_call(dev, VIRTIO_RDMA_CMD_ALLOC_PD, NULL, 0, &resp, sizeof(resp));
	if (ret)
		return ret;
	to_vpd(ibpd)->pdn = le32_to_cpu(resp.number);
	return 0;
}

int vrdma_dealloc_pd(struct ib_pd *ibpd, struct ib_udata *udata)
{
	struct vrdma_dev *dev = to_vdev(ibpd->device);

	vrdma_ctrl_destroy(dev, VIRTIO_RDMA_CMD_DEALLOC_PD, to_vpd(ibpd)->pdn);
	return 0;
}
