// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * Regions with on-demand paging: memory of a process that is not pinned.
 *
 * The device has a region's pages as long as the process does. It asks for those that it misses
 * with an event; a work item has the kernel fault them in and gives them. When the kernel takes
 * pages from the process, an MMU notifier takes them from the device first.
 *
 * The mutex of the umem orders the two. The notifier takes it and may run while memory is
 * reclaimed: under it nothing is allocated, but its command is there from the beginning. A command
 * that gives pages is made before and waited for after; the device executes commands in the order
 * in which they were submitted.
 */
#include <linux/bitmap.h>
#include <linux/hmm.h>
#include <linux/mm.h>
#include <linux/slab.h>

#include "compat.h"
#include "vrdma.h"

#if IS_ENABLED(CONFIG_INFINIBAND_ON_DEMAND_PAGING)

/* Pages of the device that one command gives: its request is small */
#define VRDMA_ODP_BATCH		128

struct vrdma_odp {
	struct vrdma_dev *dev;
	struct vrdma_mr *mr;
	struct ib_umem_odp *umem;
	u64 start;			/* address of the device's page 0 */
	u32 num_pages;			/* of the device */
	unsigned long *given;		/* pages of the kernel that the device may have */
	struct vrdma_cmd *unmap;	/* the notifier's */
	bool gone;			/* no page is given any more */
	refcount_t ref;
	struct completion idle;
};

enum vrdma_odp_how {
	VRDMA_ODP_READ,
	VRDMA_ODP_WRITE,
	VRDMA_ODP_PRESENT,	/* as they are, without having any faulted in */
};

struct vrdma_odp_work {
	struct work_struct work;
	struct vrdma_odp *odp;
	u32 first;
	u32 count;
	enum vrdma_odp_how how;
	bool advice;		/* nobody waits for it */
};

static struct vrdma_odp *vrdma_odp_get(struct vrdma_dev *dev, u32 key)
{
	struct vrdma_odp *odp;
	unsigned long flags;

	xa_lock_irqsave(&dev->odps, flags);
	odp = xa_load(&dev->odps, key);
	if (odp && !refcount_inc_not_zero(&odp->ref))
		odp = NULL;
	xa_unlock_irqrestore(&dev->odps, flags);
	return odp;
}

static void vrdma_odp_put(struct vrdma_odp *odp)
{
	if (refcount_dec_and_test(&odp->ref))
		complete(&odp->idle);
}

static u64 vrdma_odp_addr(const struct vrdma_odp *odp, u32 page)
{
	return odp->start + (u64)page * VIRTIO_RDMA_PAGE_SIZE;
}

/* Which of the kernel's pages an address is in */
static unsigned long vrdma_odp_index(const struct vrdma_odp *odp, u64 addr)
{
	return (addr - ib_umem_start(odp->umem)) >> PAGE_SHIFT;
}

static unsigned long vrdma_odp_pfn(const struct vrdma_odp *odp, u32 page)
{
	return vrdma_umem_pfns(odp->umem)[vrdma_odp_index(odp, vrdma_odp_addr(odp, page))];
}

/*
 * Where a page is. The kernel's page of zeros may be part of its image, which not every VMM shares
 * (User-mode Linux does not): the device reads one of ours.
 */
static u64 vrdma_odp_phys(const struct vrdma_odp *odp, struct page *page, u64 addr)
{
	if (page == ZERO_PAGE(addr))
		page = virt_to_page(odp->dev->zeros);
	return page_to_phys(page) + offset_in_page(addr);
}

static bool vrdma_odp_fits(const struct vrdma_odp *odp, u32 page, enum vrdma_odp_how how,
			   bool writable)
{
	unsigned long pfn = vrdma_odp_pfn(odp, page);

	if (!(pfn & HMM_PFN_VALID))
		return false;
	return how != VRDMA_ODP_PRESENT || !writable || (pfn & HMM_PFN_WRITE);
}

/*
 * Describes the pages from @first on that are alike, and notes that the device will have them.
 * Those that it may write are dirty from now on: who cleans them takes them away before.
 */
static u32 vrdma_odp_describe(struct vrdma_odp *odp, struct virtio_rdma_extent *out, u32 *num,
			      u32 first, u32 count, enum vrdma_odp_how how, bool writable)
{
	u64 end = 0;
	u32 i;

	for (i = 0; i < count && vrdma_odp_fits(odp, first + i, how, writable); i++) {
		u64 addr = vrdma_odp_addr(odp, first + i);
		struct page *page = hmm_pfn_to_page(vrdma_odp_pfn(odp, first + i));
		u64 phys = vrdma_odp_phys(odp, page, addr);

		if (!i || phys != end) {
			out[*num].addr = cpu_to_le64(phys);
			out[(*num)++].len = 0;
		}
		le64_add_cpu(&out[*num - 1].len, VIRTIO_RDMA_PAGE_SIZE);
		end = phys + VIRTIO_RDMA_PAGE_SIZE;
		if (writable)
			set_page_dirty(compound_head(page));
		__set_bit(vrdma_odp_index(odp, addr), odp->given);
	}
	return i;
}

/* Passes over pages that are not there */
static u32 vrdma_odp_absent(const struct vrdma_odp *odp, u32 first, u32 count)
{
	u32 i;

	for (i = 0; i < count && !(vrdma_odp_pfn(odp, first + i) & HMM_PFN_VALID); i++)
		;
	return i;
}

/*
 * Submits what is known of the pages; the umem's mutex is held. Says how many were dealt with, and
 * whether there is an answer to wait for.
 */
static int vrdma_odp_send(struct vrdma_odp *odp, struct vrdma_cmd *cmd, u32 first, u32 count,
			  enum vrdma_odp_how how, bool *sent)
{
	struct virtio_rdma_map_pages *req = vrdma_cmd_body(cmd);
	u32 absent = vrdma_odp_absent(odp, first, count);
	bool writable = how == VRDMA_ODP_WRITE;
	u32 done, num = 0;
	int ret;

	if (odp->gone)
		return -EINVAL;
	/* It gets none any more, and none is kept for it twice */
	if (vrdma_is_dead(odp->dev))
		return -EIO;
	if (absent == count)
		return count;
	first += absent;
	if (how == VRDMA_ODP_PRESENT)
		writable = odp->umem->umem.writable && (vrdma_odp_pfn(odp, first) & HMM_PFN_WRITE);
	done = vrdma_odp_describe(odp, vrdma_cmd_extents(cmd), &num, first, count - absent, how,
				  writable);
	req->key = cpu_to_le32(odp->mr->ibmr.lkey);
	req->flags = cpu_to_le32(writable ? VIRTIO_RDMA_PAGES_WRITE : 0);
	req->first = cpu_to_le32(first);
	req->num_extents = cpu_to_le32(num);
	vrdma_cmd_shrink(cmd, num);
	ret = vrdma_cmd_submit(odp->dev, cmd);
	*sent = !ret;
	return ret ?: absent + done;
}

/* Gives the device up to so many pages; how many were dealt with. -EAGAIN: not now */
static int vrdma_odp_give(struct vrdma_odp *odp, u32 first, u32 count, enum vrdma_odp_how how)
{
	u64 mask = how == VRDMA_ODP_READ ? VRDMA_UMEM_READ : VRDMA_UMEM_READ | VRDMA_UMEM_WRITE;
	struct vrdma_cmd *cmd;
	bool sent = false;
	int done, ret;

	count = min_t(u32, count, VRDMA_ODP_BATCH);
	cmd = vrdma_cmd_alloc(VIRTIO_RDMA_CMD_MAP_PAGES, sizeof(struct virtio_rdma_map_pages),
			      count, 0);
	if (!cmd)
		return -EAGAIN;
	ret = ib_umem_odp_map_dma_and_lock(odp->umem, vrdma_odp_addr(odp, first),
					   (u64)count * VIRTIO_RDMA_PAGE_SIZE, mask,
					   how != VRDMA_ODP_PRESENT);
	if (ret < 0) {
		vrdma_cmd_free(odp->dev, cmd);
		return ret == -EBUSY ? -EAGAIN : ret;
	}
	done = vrdma_odp_send(odp, cmd, first, count, how, &sent);
	mutex_unlock(&odp->umem->umem_mutex);
	ret = sent ? vrdma_cmd_wait(odp->dev, cmd) : 0;
	vrdma_cmd_free(odp->dev, cmd);
	return ret ?: done;
}

static int vrdma_odp_give_all(struct vrdma_odp *odp, u32 first, u32 count, enum vrdma_odp_how how)
{
	int ret;

	if (how == VRDMA_ODP_WRITE && !odp->umem->umem.writable)
		return -EPERM;
	while (count) {
		ret = vrdma_odp_give(odp, first, count, how);
		if (ret < 0)
			return ret;
		first += ret;
		count -= ret;
		cond_resched();
	}
	return 0;
}

/* The page cannot be had: who waits for it is to fail. If this gets lost the device asks again. */
static void vrdma_odp_deny(struct vrdma_odp *odp, u32 page, bool write)
{
	struct virtio_rdma_page_range req = {
		.key = cpu_to_le32(odp->mr->ibmr.lkey),
		.flags = cpu_to_le32(write ? VIRTIO_RDMA_PAGES_WRITE : 0),
		.first = cpu_to_le32(page),
		.count = cpu_to_le32(1),
	};

	vrdma_ctrl_call(odp->dev, VIRTIO_RDMA_CMD_DENY_PAGES, &req, sizeof(req), NULL, 0);
}

static void vrdma_odp_work(struct work_struct *w)
{
	struct vrdma_odp_work *work = container_of(w, struct vrdma_odp_work, work);
	struct vrdma_odp *odp = work->odp;
	int ret;

	ret = vrdma_odp_give_all(odp, work->first, work->count, work->how);
	/* It asks for as much as the access is long; that part of it is missing may never matter */
	if (ret && ret != -EAGAIN && !work->advice) {
		ret = vrdma_odp_give_all(odp, work->first, 1, work->how);
		if (ret && ret != -EAGAIN)
			vrdma_odp_deny(odp, work->first, work->how == VRDMA_ODP_WRITE);
	}
	vrdma_odp_put(odp);
	kfree(work);
}

/* The work has the caller's reference */
static void vrdma_odp_queue(struct vrdma_odp *odp, struct vrdma_odp_work *work)
{
	work->odp = odp;
	INIT_WORK(&work->work, vrdma_odp_work);
	queue_work(vrdma_wq, &work->work);
}

static bool vrdma_odp_has(const struct vrdma_odp *odp, u32 first, u32 count)
{
	return count && first < odp->num_pages && count <= odp->num_pages - first;
}

/* Interrupt context. Without memory to note it down the device asks again. */
void vrdma_odp_fault(struct vrdma_dev *dev, const struct virtio_rdma_event *event)
{
	struct vrdma_odp *odp = vrdma_odp_get(dev, le32_to_cpu(event->number));
	struct vrdma_odp_work *work;

	if (!odp)
		return;
	work = kzalloc(sizeof(*work), GFP_ATOMIC | __GFP_NOWARN);
	if (!work)
		goto put;
	work->first = le32_to_cpu(event->page);
	work->count = le32_to_cpu(event->count);
	work->how = le16_to_cpu(event->write) ? VRDMA_ODP_WRITE : VRDMA_ODP_READ;
	if (vrdma_odp_has(odp, work->first, work->count)) {
		vrdma_odp_queue(odp, work);
		return;
	}
	kfree(work);
put:
	vrdma_odp_put(odp);
}

/*
 * The device does not answer and may use these pages still: nobody gets them until it has been
 * reset and its virtqueues are gone, which is when it is unbound.
 */
static void vrdma_odp_keep(struct vrdma_odp *odp, unsigned long first, unsigned long end)
{
	const unsigned long *pfns = vrdma_umem_pfns(odp->umem);
	unsigned long i;

	for (i = first; i < end; i++)
		if (test_bit(i, odp->given))
			vrdma_page_park(odp->dev, hmm_pfn_to_page(pfns[i]));
}

/* Takes pages from the device, those of the kernel from @first to before @end */
static void vrdma_odp_take(struct vrdma_odp *odp, unsigned long first, unsigned long end)
{
	struct virtio_rdma_page_range *req = vrdma_cmd_body(odp->unmap);
	u64 from, to;
	int ret;

	first = find_next_bit(odp->given, end, first);
	if (first >= end)
		return;
	from = max_t(u64, ib_umem_start(odp->umem) + ((u64)first << PAGE_SHIFT), odp->start);
	to = min_t(u64, ib_umem_start(odp->umem) + ((u64)end << PAGE_SHIFT),
		   vrdma_odp_addr(odp, odp->num_pages));
	req->key = cpu_to_le32(odp->mr->ibmr.lkey);
	req->first = cpu_to_le32((from - odp->start) / VIRTIO_RDMA_PAGE_SIZE);
	req->count = cpu_to_le32((to - from) / VIRTIO_RDMA_PAGE_SIZE);
	ret = vrdma_cmd_again(odp->dev, odp->unmap);
	/* Of a region that is being deregistered the device may know nothing any more */
	if (ret && !(ret == -EINVAL && odp->gone)) {
		vrdma_dev_fail(odp->dev, "the device does not let go of a page");
		vrdma_odp_keep(odp, first, end);
	}
	bitmap_clear(odp->given, first, end - first);
}

static bool vrdma_odp_invalidate(struct mmu_interval_notifier *notifier,
				 const struct mmu_notifier_range *range, unsigned long seq)
{
	struct ib_umem_odp *umem = container_of(notifier, struct ib_umem_odp, notifier);
	struct vrdma_odp *odp = umem->private;
	u64 start, end;

	if (!mmu_notifier_range_blockable(range))
		return false;
	mutex_lock(&umem->umem_mutex);
	mmu_interval_set_seq(notifier, seq);
	start = max_t(u64, ib_umem_start(umem), range->start);
	end = min_t(u64, ib_umem_end(umem), range->end);
	/* Before anybody can have asked for a page there is no region yet */
	if (odp && start < end)
		vrdma_odp_take(odp, vrdma_odp_index(odp, start),
			       vrdma_odp_index(odp, end - 1) + 1);
	ib_umem_odp_unmap_dma_pages(umem, start, end);
	mutex_unlock(&umem->umem_mutex);
	return true;
}

static const struct mmu_interval_notifier_ops vrdma_odp_notifier_ops = {
	.invalidate = vrdma_odp_invalidate,
};

static void vrdma_odp_free(struct vrdma_odp *odp)
{
	if (!IS_ERR_OR_NULL(odp->umem))
		ib_umem_odp_release(odp->umem);
	kvfree(odp->given);
	vrdma_cmd_free(odp->dev, odp->unmap);
	kfree(odp);
}

static struct vrdma_odp *vrdma_odp_alloc(struct vrdma_mr *mr, struct vrdma_dev *dev, u64 start,
					 u64 length, int access)
{
	struct vrdma_odp *odp;
	int ret = -ENOMEM;

	odp = kzalloc(sizeof(*odp), GFP_KERNEL);
	if (!odp)
		return ERR_PTR(-ENOMEM);
	odp->dev = dev;
	odp->mr = mr;
	odp->start = ALIGN_DOWN(start, VIRTIO_RDMA_PAGE_SIZE);
	odp->num_pages = DIV_ROUND_UP(start + length - odp->start, VIRTIO_RDMA_PAGE_SIZE);
	refcount_set(&odp->ref, 1);
	init_completion(&odp->idle);
	odp->unmap = vrdma_cmd_alloc(VIRTIO_RDMA_CMD_UNMAP_PAGES,
				     sizeof(struct virtio_rdma_page_range), 0, 0);
	odp->given = kvcalloc(BITS_TO_LONGS(length / PAGE_SIZE + 2), sizeof(long),
			      GFP_KERNEL_ACCOUNT | __GFP_NOWARN);
	if (!odp->unmap || !odp->given)
		goto err;
	/* Pages of any size are given in those of the device */
	odp->umem = ib_umem_odp_get(&dev->ibdev, start, length, access & ~IB_ACCESS_HUGETLB,
				    &vrdma_odp_notifier_ops);
	if (IS_ERR(odp->umem)) {
		ret = PTR_ERR(odp->umem);
		goto err;
	}
	mutex_lock(&odp->umem->umem_mutex);
	odp->umem->private = odp;
	mutex_unlock(&odp->umem->umem_mutex);
	return odp;

err:
	vrdma_odp_free(odp);
	return ERR_PTR(ret);
}

static int vrdma_odp_register(struct vrdma_dev *dev, struct vrdma_mr *mr, u32 pdn, u64 length)
{
	struct virtio_rdma_reg_mr req = {
		.pdn = cpu_to_le32(pdn),
		.access = cpu_to_le32(mr->access),
		.iova = cpu_to_le64(mr->iova),
		.length = cpu_to_le64(length),
		.flags = cpu_to_le32(VIRTIO_RDMA_REG_ON_DEMAND),
	};
	struct virtio_rdma_object_resp resp;
	int ret;

	ret = vrdma_ctrl_call(dev, VIRTIO_RDMA_CMD_REG_MR, &req, sizeof(req), &resp, sizeof(resp));
	if (ret)
		return ret;
	mr->ibmr.lkey = le32_to_cpu(resp.number);
	mr->ibmr.rkey = mr->ibmr.lkey;
	ret = xa_err(xa_store_irq(&dev->odps, mr->ibmr.lkey, mr->odp, GFP_KERNEL));
	if (ret)
		vrdma_ctrl_destroy(dev, VIRTIO_RDMA_CMD_DEREG_MR, mr->ibmr.lkey);
	return ret;
}

/* @mr has its access flags, and gets what else it needs */
int vrdma_odp_reg(struct vrdma_dev *dev, struct vrdma_mr *mr, u32 pdn, u64 start, u64 length,
		  u64 iova, int access)
{
	struct vrdma_odp *odp;
	int ret;

	if (!length || start + length < start ||
	    (length + 2 * VIRTIO_RDMA_PAGE_SIZE) / VIRTIO_RDMA_PAGE_SIZE >
	    VIRTIO_RDMA_MAX_ON_DEMAND_PAGES ||
	    ((start ^ iova) & (VIRTIO_RDMA_PAGE_SIZE - 1)) || (access & IB_ZERO_BASED))
		return -EINVAL;
	odp = vrdma_odp_alloc(mr, dev, start, length, access);
	if (IS_ERR(odp))
		return PTR_ERR(odp);
	mr->odp = odp;
	mr->iova = iova;
	ret = vrdma_odp_register(dev, mr, pdn, length);
	if (ret) {
		mr->odp = NULL;
		vrdma_odp_free(odp);
	}
	return ret;
}

static void vrdma_odp_stop(struct vrdma_odp *odp, bool stop)
{
	mutex_lock(&odp->umem->umem_mutex);
	odp->gone = stop;
	mutex_unlock(&odp->umem->umem_mutex);
}

/* The region stays, with -EBUSY, while windows are bound to it */
int vrdma_odp_dereg(struct vrdma_dev *dev, struct vrdma_mr *mr)
{
	struct vrdma_odp *odp = mr->odp;
	unsigned long end = vrdma_odp_index(odp, ib_umem_end(odp->umem));
	int ret;

	/* Its key may soon be another's */
	vrdma_odp_stop(odp, true);
	ret = vrdma_ctrl_destroy_unused(dev, VIRTIO_RDMA_CMD_DEREG_MR, mr->ibmr.lkey);
	if (ret) {
		vrdma_odp_stop(odp, false);
		return ret;
	}
	xa_lock_irq(&dev->odps);
	__xa_cmpxchg(&dev->odps, mr->ibmr.lkey, odp, NULL, 0);
	xa_unlock_irq(&dev->odps);
	vrdma_odp_put(odp);
	wait_for_completion(&odp->idle);

	mutex_lock(&odp->umem->umem_mutex);
	if (vrdma_is_dead(dev))
		vrdma_odp_keep(odp, 0, end);
	bitmap_zero(odp->given, end);
	mutex_unlock(&odp->umem->umem_mutex);
	vrdma_odp_free(odp);
	return 0;
}

bool vrdma_odp_writable(const struct vrdma_mr *mr)
{
	return mr->odp->umem->umem.writable;
}

static int vrdma_odp_advise(struct vrdma_dev *dev, struct ib_pd *ibpd, const struct ib_sge *sge,
			    enum vrdma_odp_how how, bool wait)
{
	struct vrdma_odp *odp = vrdma_odp_get(dev, sge->lkey);
	struct vrdma_odp_work *work;
	u64 offset;
	u32 first, end;
	int ret = -EINVAL;

	if (!odp)
		return ret;
	if (odp->mr->ibmr.pd != ibpd || sge->addr < odp->mr->iova || !sge->length)
		goto put;
	/* From the region's first page, which the address of the memory is in at the same place */
	offset = sge->addr - ALIGN_DOWN(odp->mr->iova, VIRTIO_RDMA_PAGE_SIZE);
	if (offset + sge->length > (u64)odp->num_pages * VIRTIO_RDMA_PAGE_SIZE)
		goto put;
	first = offset / VIRTIO_RDMA_PAGE_SIZE;
	end = DIV_ROUND_UP(offset + sge->length, VIRTIO_RDMA_PAGE_SIZE);
	if (wait) {
		ret = vrdma_odp_give_all(odp, first, end - first, how);
		goto put;
	}
	ret = -ENOMEM;
	work = kzalloc(sizeof(*work), GFP_KERNEL_ACCOUNT);
	if (!work)
		goto put;
	work->first = first;
	work->count = end - first;
	work->how = how;
	work->advice = true;
	vrdma_odp_queue(odp, work);
	return 0;

put:
	vrdma_odp_put(odp);
	return ret;
}

static int vrdma_advise_mr(struct ib_pd *ibpd, enum ib_uverbs_advise_mr_advice advice, u32 flags,
			   struct ib_sge *sges, u32 num_sge, struct uverbs_attr_bundle *attrs)
{
	bool wait = flags & IB_UVERBS_ADVISE_MR_FLAG_FLUSH;
	enum vrdma_odp_how how;
	int ret = 0;
	u32 i;

	switch (advice) {
	case IB_UVERBS_ADVISE_MR_ADVICE_PREFETCH:
		how = VRDMA_ODP_READ;
		break;
	case IB_UVERBS_ADVISE_MR_ADVICE_PREFETCH_WRITE:
		how = VRDMA_ODP_WRITE;
		break;
	case IB_UVERBS_ADVISE_MR_ADVICE_PREFETCH_NO_FAULT:
		how = VRDMA_ODP_PRESENT;
		break;
	default:
		return -EOPNOTSUPP;
	}
	for (i = 0; i < num_sge && !ret; i++)
		ret = vrdma_odp_advise(to_vdev(ibpd->device), ibpd, &sges[i], how, wait);
	return ret;
}

static const struct ib_device_ops vrdma_odp_ops = {
	.advise_mr = vrdma_advise_mr,
};

/* What rxe offers, which has no implicit regions */
void vrdma_odp_query(struct vrdma_dev *dev, struct ib_device_attr *attr)
{
	struct ib_odp_caps *caps = &attr->odp_caps;
	u32 receives = IB_ODP_SUPPORT_SEND | IB_ODP_SUPPORT_RECV | IB_ODP_SUPPORT_SRQ_RECV;

	if (!dev->on_demand)
		return;
	attr->kernel_cap_flags |= IBK_ON_DEMAND_PAGING;
	caps->general_caps = IB_ODP_SUPPORT;
	caps->per_transport_caps.ud_odp_caps = receives;
	caps->per_transport_caps.rc_odp_caps = receives | IB_ODP_SUPPORT_WRITE |
					       IB_ODP_SUPPORT_READ | IB_ODP_SUPPORT_ATOMIC |
					       VRDMA_ODP_ORDERING;
}

void vrdma_odp_init(struct vrdma_dev *dev)
{
	if (!virtio_has_feature(dev->vdev, VIRTIO_RDMA_F_ON_DEMAND))
		return;
	dev->zeros = (void *)get_zeroed_page(GFP_KERNEL);
	dev->on_demand = dev->zeros;
	if (dev->on_demand)
		ib_set_device_ops(&dev->ibdev, &vrdma_odp_ops);
}

/* After the reset */
void vrdma_odp_exit(struct vrdma_dev *dev)
{
	free_page((unsigned long)dev->zeros);
}

#endif
