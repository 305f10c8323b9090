// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * Memory regions: pinned pages, described to the device as byte-granular extents.
 */
#include <linux/scatterlist.h>
#include <linux/sched.h>
#include <linux/slab.h>

#include "compat.h"
#include "vrdma.h"

/* Requests under way while a large region is described */
#define VRDMA_MR_PIPELINE	4

/* Goes through a region's memory, contiguous piece by contiguous piece */
struct vrdma_walk {
	struct scatterlist *sg;
	unsigned int sgs_left;
	u64 skip;
	u64 bytes_left;
};

static void vrdma_walk_start(struct vrdma_walk *walk, struct ib_umem *umem)
{
	walk->sg = umem->sgt_append.sgt.sgl;
	walk->sgs_left = umem->sgt_append.sgt.orig_nents;
	walk->skip = ib_umem_offset(umem);
	walk->bytes_left = umem->length;
}

static bool vrdma_walk_next(struct vrdma_walk *walk, u64 *addr, u64 *len)
{
	u64 end;

	if (!walk->bytes_left || !walk->sgs_left)
		return false;
	*addr = sg_phys(walk->sg) + walk->skip;
	end = sg_phys(walk->sg) + walk->sg->length;
	walk->skip = 0;
	for (;;) {
		walk->sgs_left--;
		walk->sg = sg_next(walk->sg);
		if (!walk->sgs_left || sg_phys(walk->sg) != end)
			break;
		end += walk->sg->length;
	}
	*len = min(end - *addr, walk->bytes_left);
	walk->bytes_left -= *len;
	return true;
}

static u64 vrdma_count_extents(struct ib_umem *umem)
{
	struct vrdma_walk walk;
	u64 addr, len, num = 0;

	vrdma_walk_start(&walk, umem);
	while (vrdma_walk_next(&walk, &addr, &len))
		num++;
	return num;
}

static void vrdma_fill_extents(struct vrdma_walk *walk, struct virtio_rdma_extent *out, u32 num)
{
	u64 addr, len;
	u32 i;

	for (i = 0; i < num && vrdma_walk_next(walk, &addr, &len); i++) {
		out[i].addr = cpu_to_le64(addr);
		out[i].len = cpu_to_le64(len);
	}
	cond_resched();
}

static struct vrdma_cmd *vrdma_extend_cmd(struct vrdma_dev *dev, u32 key, struct vrdma_walk *walk,
					  u64 *left)
{
	struct virtio_rdma_extend_mr *req;
	u32 num = min_t(u64, *left, vrdma_cmd_max_extents(dev, sizeof(*req)));
	struct vrdma_cmd *cmd;

	cmd = vrdma_cmd_alloc(VIRTIO_RDMA_CMD_EXTEND_MR, sizeof(*req), num, 0);
	if (!cmd)
		return NULL;
	req = vrdma_cmd_body(cmd);
	req->key = cpu_to_le32(key);
	req->num_extents = cpu_to_le32(num);
	vrdma_fill_extents(walk, vrdma_cmd_extents(cmd), num);
	*left -= num;
	return cmd;
}

static int vrdma_finish_cmd(struct vrdma_dev *dev, struct vrdma_cmd *cmd)
{
	int ret = vrdma_cmd_wait(dev, cmd);

	vrdma_cmd_free(dev, cmd);
	return ret;
}

/* Describes what did not fit into the first request, several requests at a time */
static int vrdma_mr_extend(struct vrdma_dev *dev, u32 key, struct vrdma_walk *walk, u64 left)
{
	struct vrdma_cmd *cmds[VRDMA_MR_PIPELINE];
	unsigned int head = 0, tail = 0;
	int ret = 0, err;

	while (left && !ret) {
		struct vrdma_cmd *cmd = vrdma_extend_cmd(dev, key, walk, &left);

		ret = cmd ? vrdma_cmd_submit(dev, cmd) : -ENOMEM;
		if (ret) {
			vrdma_cmd_free(dev, cmd);
			break;
		}
		cmds[head++ % VRDMA_MR_PIPELINE] = cmd;
		if (head - tail == VRDMA_MR_PIPELINE)
			ret = vrdma_finish_cmd(dev, cmds[tail++ % VRDMA_MR_PIPELINE]);
	}
	while (tail != head) {
		err = vrdma_finish_cmd(dev, cmds[tail++ % VRDMA_MR_PIPELINE]);
		ret = ret ?: err;
	}
	return ret;
}

/* What the device is told of the flags: hints that it does not know are left out */
static int vrdma_mr_access(struct vrdma_dev *dev, int access)
{
	int hints = IB_ACCESS_OPTIONAL | IB_ACCESS_HUGETLB;

	if (access & ~(dev->attr.access_flags | hints))
		return -EOPNOTSUPP;
	return access & dev->attr.access_flags;
}

static u64 vrdma_mr_iova(u64 iova, int access)
{
	return access & IB_ZERO_BASED ? 0 : iova;
}

static int vrdma_mr_register(struct vrdma_dev *dev, struct vrdma_mr *mr, u32 pdn, u64 iova)
{
	u64 left = vrdma_count_extents(mr->umem);
	const struct virtio_rdma_object_resp *resp;
	struct virtio_rdma_reg_mr *req;
	struct vrdma_walk walk;
	struct vrdma_cmd *cmd;
	u32 num, key;
	int ret;

	num = min_t(u64, left, vrdma_cmd_max_extents(dev, sizeof(*req)));
	cmd = vrdma_cmd_alloc(VIRTIO_RDMA_CMD_REG_MR, sizeof(*req), num, sizeof(*resp));
	if (!cmd)
		return -ENOMEM;
	req = vrdma_cmd_body(cmd);
	req->pdn = cpu_to_le32(pdn);
	req->access = cpu_to_le32(mr->access);
	req->iova = cpu_to_le64(vrdma_mr_iova(iova, mr->access));
	req->length = cpu_to_le64(mr->umem->length);
	req->num_extents = cpu_to_le32(num);
	vrdma_walk_start(&walk, mr->umem);
	vrdma_fill_extents(&walk, vrdma_cmd_extents(cmd), num);
	ret = vrdma_cmd_run(dev, cmd);
	resp = vrdma_cmd_result(cmd);
	key = le32_to_cpu(resp->number);
	vrdma_cmd_free(dev, cmd);
	if (ret)
		return ret;

	ret = vrdma_mr_extend(dev, key, &walk, left - num);
	if (ret) {
		vrdma_ctrl_destroy(dev, VIRTIO_RDMA_CMD_DEREG_MR, key);
		return ret;
	}
	mr->iova = iova;
	mr->ibmr.lkey = key;
	mr->ibmr.rkey = key;
	return 0;
}

struct ib_mr *vrdma_reg_user_mr(struct ib_pd *ibpd, u64 start, u64 length, u64 iova, int access,
				struct ib_udata *udata)
{
	struct vrdma_dev *dev = to_vdev(ibpd->device);
	bool on_demand = dev->on_demand && (access & IB_ACCESS_ON_DEMAND);
	struct vrdma_mr *mr;
	int ret;

	if (length > dev->attr.max_mr_size)
		return ERR_PTR(-EINVAL);
	ret = vrdma_mr_access(dev, on_demand ? access & ~IB_ACCESS_ON_DEMAND : access);
	if (ret < 0)
		return ERR_PTR(ret);
	mr = kzalloc(sizeof(*mr), GFP_KERNEL);
	if (!mr)
		return ERR_PTR(-ENOMEM);
	mr->access = ret;
	if (on_demand) {
		ret = vrdma_odp_reg(dev, mr, to_vpd(ibpd)->pdn, start, length, iova, access);
		if (ret)
			goto err_free;
		return &mr->ibmr;
	}
	mr->umem = vrdma_umem_get(&dev->ibdev, start, length, access);
	if (IS_ERR(mr->umem)) {
		ret = PTR_ERR(mr->umem);
		goto err_free;
	}
	ret = vrdma_mr_register(dev, mr, to_vpd(ibpd)->pdn, iova);
	if (ret)
		goto err_umem;
	return &mr->ibmr;

err_umem:
	vrdma_umem_release(dev, mr->umem);
err_free:
	kfree(mr);
	return ERR_PTR(ret);
}

struct vrdma_rereg {
	int flags;
	u32 pdn;
	int access;
	u64 iova;
	struct ib_umem *umem;	/* new memory, or NULL */
};

/* The core leaves a region whose change has failed in its old protection domain: so does this */
static void vrdma_mr_restore_pd(struct vrdma_dev *dev, struct vrdma_mr *mr)
{
	struct virtio_rdma_rereg_mr req = {
		.key = cpu_to_le32(mr->ibmr.lkey),
		.flags = cpu_to_le32(VIRTIO_RDMA_REREG_PD),
		.pdn = cpu_to_le32(to_vpd(mr->ibmr.pd)->pdn),
	};

	vrdma_ctrl_must(dev, VIRTIO_RDMA_CMD_REREG_MR, &req, sizeof(req));
}

/* The new memory belongs to the region once the device has accepted the first request, even if
 * describing the rest fails: the region does not work then, and can only be deregistered.
 */
static int vrdma_mr_reregister(struct vrdma_dev *dev, struct vrdma_mr *mr, struct vrdma_rereg *re)
{
	u64 left = re->umem ? vrdma_count_extents(re->umem) : 0;
	struct virtio_rdma_rereg_mr *req;
	struct vrdma_walk walk;
	struct vrdma_cmd *cmd;
	u32 num;
	int ret;

	num = min_t(u64, left, vrdma_cmd_max_extents(dev, sizeof(*req)));
	cmd = vrdma_cmd_alloc(VIRTIO_RDMA_CMD_REREG_MR, sizeof(*req), num, 0);
	if (!cmd)
		return -ENOMEM;
	req = vrdma_cmd_body(cmd);
	req->key = cpu_to_le32(mr->ibmr.lkey);
	req->flags = cpu_to_le32(re->flags);
	req->num_extents = cpu_to_le32(num);
	if (re->flags & VIRTIO_RDMA_REREG_PD)
		req->pdn = cpu_to_le32(re->pdn);
	if (re->flags & VIRTIO_RDMA_REREG_ACCESS)
		req->access = cpu_to_le32(re->access);
	if (re->umem) {
		req->iova = cpu_to_le64(vrdma_mr_iova(re->iova, re->access));
		req->length = cpu_to_le64(re->umem->length);
		vrdma_walk_start(&walk, re->umem);
		vrdma_fill_extents(&walk, vrdma_cmd_extents(cmd), num);
	}
	ret = vrdma_cmd_run(dev, cmd);
	vrdma_cmd_free(dev, cmd);
	if (ret)
		return ret;

	mr->access = re->access;
	if (!re->umem)
		return 0;
	ib_umem_release(mr->umem);
	mr->umem = re->umem;
	mr->iova = re->iova;
	re->umem = NULL;
	ret = vrdma_mr_extend(dev, mr->ibmr.lkey, &walk, left - num);
	if (ret && (re->flags & VIRTIO_RDMA_REREG_PD))
		vrdma_mr_restore_pd(dev, mr);
	return ret;
}

struct ib_mr *vrdma_rereg_user_mr(struct ib_mr *ibmr, int flags, u64 start, u64 length, u64 iova,
				  int access, struct ib_pd *ibpd, struct ib_udata *udata)
{
	struct vrdma_dev *dev = to_vdev(ibmr->device);
	struct vrdma_mr *mr = to_vmr(ibmr);
	struct vrdma_rereg re = {
		.flags = flags,
		.pdn = to_vpd(ibpd)->pdn,
		.access = mr->access,
	};
	int ret;

	if (flags & ~(IB_MR_REREG_TRANS | IB_MR_REREG_PD | IB_MR_REREG_ACCESS))
		return ERR_PTR(-EOPNOTSUPP);
	if (flags & IB_MR_REREG_ACCESS) {
		re.access = vrdma_mr_access(dev, mr->odp ? access & ~IB_ACCESS_ON_DEMAND : access);
		if (re.access < 0)
			return ERR_PTR(re.access);
	}
	if (mr->odp && ((flags & IB_MR_REREG_TRANS) || (re.access & IB_ZERO_BASED) ||
			((flags & IB_MR_REREG_ACCESS) && !(access & IB_ACCESS_ON_DEMAND)) ||
			(ib_access_writable(re.access) && !vrdma_odp_writable(mr))))
		return ERR_PTR(-EOPNOTSUPP);
	/* Pages that were pinned to be read, or whose addresses start elsewhere, are pinned anew */
	if (!mr->odp && !(flags & IB_MR_REREG_TRANS) &&
	    ((ib_access_writable(re.access) && !mr->umem->writable) ||
	     ((re.access ^ mr->access) & IB_ZERO_BASED))) {
		if (mr->umem->owning_mm != current->mm)
			return ERR_PTR(-EACCES);
		re.flags |= VIRTIO_RDMA_REREG_TRANS;
		start = mr->umem->address;
		length = mr->umem->length;
		iova = mr->iova;
	}
	if (re.flags & VIRTIO_RDMA_REREG_TRANS) {
		if (length > dev->attr.max_mr_size)
			return ERR_PTR(-EINVAL);
		re.iova = iova;
		re.umem = vrdma_umem_get(&dev->ibdev, start, length, re.access);
		if (IS_ERR(re.umem))
			return ERR_CAST(re.umem);
	}
	ret = vrdma_mr_reregister(dev, mr, &re);
	if (re.umem)
		vrdma_umem_release(dev, re.umem);
	return ERR_PTR(ret);
}

int vrdma_dereg_mr(struct ib_mr *ibmr, struct ib_udata *udata)
{
	struct vrdma_dev *dev = to_vdev(ibmr->device);
	struct vrdma_mr *mr = to_vmr(ibmr);
	int ret;

	/* Windows may be bound to it */
	ret = mr->odp ? vrdma_odp_dereg(dev, mr) :
	      vrdma_ctrl_destroy_unused(dev, VIRTIO_RDMA_CMD_DEREG_MR, ibmr->lkey);
	if (ret)
		return ret;
	if (mr->umem)
		vrdma_umem_release(dev, mr->umem);
	else if (!mr->odp)
		vrdma_dev_silence(dev);
	kfree(mr->extents);
	kfree(mr);
	return 0;
}
