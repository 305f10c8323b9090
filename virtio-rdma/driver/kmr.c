// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * Memory of users in the kernel: all of it by one key for each protection domain, and regions for
 * fast registration, whose memory comes with a work request.
 *
 * The core has kernel addresses in place of those of DMA (ib_uses_virt_dma). The key of all
 * memory wants guest-physical ones, into which post.c translates. Peers could not: such a key is
 * for local use only.
 */
#include <linux/io.h>
#include <linux/log2.h>
#include <linux/slab.h>

#include "vrdma.h"

static struct ib_mr *vrdma_kmr_create(struct vrdma_dev *dev, u16 opcode, const void *req,
				      size_t size)
{
	struct virtio_rdma_object_resp resp;
	struct vrdma_mr *mr;
	int ret;

	mr = kzalloc(sizeof(*mr), GFP_KERNEL);
	if (!mr)
		return ERR_PTR(-ENOMEM);
	ret = vrdma_ctrl_call(dev, opcode, req, size, &resp, sizeof(resp));
	if (ret) {
		kfree(mr);
		return ERR_PTR(ret);
	}
	mr->ibmr.lkey = le32_to_cpu(resp.number);
	mr->ibmr.rkey = mr->ibmr.lkey;
	return &mr->ibmr;
}

struct ib_mr *vrdma_get_dma_mr(struct ib_pd *ibpd, int access)
{
	struct virtio_rdma_reg_mr req = {
		.pdn = cpu_to_le32(to_vpd(ibpd)->pdn),
		.access = cpu_to_le32(access),
		.flags = cpu_to_le32(VIRTIO_RDMA_REG_DMA),
	};

	if (access & ~IB_ACCESS_LOCAL_WRITE)
		return ERR_PTR(-EOPNOTSUPP);
	return vrdma_kmr_create(to_vdev(ibpd->device), VIRTIO_RDMA_CMD_REG_MR, &req, sizeof(req));
}

struct ib_mr *vrdma_alloc_mr(struct ib_pd *ibpd, enum ib_mr_type type, u32 max_num_sg)
{
	struct vrdma_dev *dev = to_vdev(ibpd->device);
	struct virtio_rdma_alloc_mr req = {
		.pdn = cpu_to_le32(to_vpd(ibpd)->pdn),
		.max_extents = cpu_to_le32(max_num_sg),
	};
	struct virtio_rdma_extent *extents;
	struct ib_mr *ibmr;

	if (type != IB_MR_TYPE_MEM_REG)
		return ERR_PTR(-EOPNOTSUPP);
	if (!max_num_sg || max_num_sg > dev->ibdev.attrs.max_fast_reg_page_list_len)
		return ERR_PTR(-EINVAL);
	/* One piece, since the device gets one address */
	extents = kcalloc(max_num_sg, sizeof(*extents), GFP_KERNEL);
	if (!extents)
		return ERR_PTR(-ENOMEM);
	ibmr = vrdma_kmr_create(dev, VIRTIO_RDMA_CMD_ALLOC_MR, &req, sizeof(req));
	if (IS_ERR(ibmr)) {
		kfree(extents);
		return ibmr;
	}
	to_vmr(ibmr)->extents = extents;
	to_vmr(ibmr)->max_extents = max_num_sg;
	return ibmr;
}

static u64 vrdma_extent_end(const struct virtio_rdma_extent *extent)
{
	return le64_to_cpu(extent->addr) + le64_to_cpu(extent->len);
}

static int vrdma_set_page(struct ib_mr *ibmr, u64 addr)
{
	struct vrdma_mr *mr = to_vmr(ibmr);
	u64 phys = virt_to_phys((void *)(uintptr_t)addr);
	struct virtio_rdma_extent *last;

	last = mr->num_extents ? &mr->extents[mr->num_extents - 1] : NULL;
	if (last && vrdma_extent_end(last) == phys) {
		le64_add_cpu(&last->len, ibmr->page_size);
		return 0;
	}
	if (mr->num_extents == mr->max_extents)
		return -ENOMEM;
	mr->extents[mr->num_extents].addr = cpu_to_le64(phys);
	mr->extents[mr->num_extents].len = cpu_to_le64(ibmr->page_size);
	mr->num_extents++;
	return 0;
}

/*
 * The pages are whole: what lies before and after the region is cut off. That can be whole
 * extents: where there were too few of them, the last page that was set does not count.
 */
static void vrdma_cut_extents(struct vrdma_mr *mr)
{
	struct virtio_rdma_extent *first = &mr->extents[0];
	u64 before = mr->ibmr.iova & (mr->ibmr.page_size - 1);
	u64 surplus = 0;
	u32 i;

	le64_add_cpu(&first->addr, before);
	le64_add_cpu(&first->len, -before);
	for (i = 0; i < mr->num_extents; i++)
		surplus += le64_to_cpu(mr->extents[i].len);
	surplus -= mr->ibmr.length;
	while (mr->num_extents > 1 &&
	       surplus >= le64_to_cpu(mr->extents[mr->num_extents - 1].len)) {
		mr->num_extents--;
		surplus -= le64_to_cpu(mr->extents[mr->num_extents].len);
	}
	le64_add_cpu(&mr->extents[mr->num_extents - 1].len, -surplus);
}

/* The device reads the extents when it executes the work request */
int vrdma_map_mr_sg(struct ib_mr *ibmr, struct scatterlist *sg, int sg_nents,
		    unsigned int *sg_offset)
{
	struct vrdma_mr *mr = to_vmr(ibmr);
	int mapped;

	if (ibmr->page_size < VIRTIO_RDMA_PAGE_SIZE || !is_power_of_2(ibmr->page_size))
		return -EINVAL;
	mr->num_extents = 0;
	mapped = ib_sg_to_pages(ibmr, sg, sg_nents, sg_offset, vrdma_set_page);
	if (mapped > 0)
		vrdma_cut_extents(mr);
	return mapped;
}
