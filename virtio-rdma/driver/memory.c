// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * Memory shared with the device: areas, which belong to the driver, and rings, which processes
 * map, or the kernel for users of its own.
 *
 * Both are made of single pages taken from blocks as large as they come, so that few extents
 * describe them. A mapping holds references to its pages, so it stays usable memory after the
 * ring has been destroyed or the device has gone.
 */
#include <linux/log2.h>
#include <linux/mm.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

#include "vrdma.h"

#define VRDMA_MAX_BLOCK_ORDER	get_order(SZ_2M)

static_assert(sizeof(struct rxe_queue_buf) == 384);

static unsigned int vrdma_alloc_block(struct page **pages, unsigned int num, unsigned int *order,
				      gfp_t gfp)
{
	unsigned int i, count;
	struct page *block;

	*order = min_t(unsigned int, *order, ilog2(num));
	for (;;) {
		gfp_t try = *order ? gfp | __GFP_NOWARN | __GFP_NORETRY : gfp;

		block = alloc_pages(try | __GFP_ZERO, *order);
		if (block || !*order)
			break;
		--*order;
	}
	if (!block)
		return 0;
	split_page(block, *order);
	count = 1U << *order;
	for (i = 0; i < count; i++)
		pages[i] = block + i;
	return count;
}

int vrdma_pages_alloc(struct vrdma_pages *mem, size_t size, gfp_t gfp)
{
	unsigned int num = DIV_ROUND_UP(size, PAGE_SIZE);
	unsigned int order = VRDMA_MAX_BLOCK_ORDER;

	mem->num = 0;
	mem->pages = kvcalloc(num, sizeof(*mem->pages), gfp);
	if (!mem->pages)
		return -ENOMEM;
	while (mem->num < num) {
		unsigned int count = vrdma_alloc_block(mem->pages + mem->num, num - mem->num,
						       &order, gfp);

		if (!count) {
			vrdma_pages_free(mem);
			return -ENOMEM;
		}
		mem->num += count;
	}
	return 0;
}

void vrdma_pages_free(struct vrdma_pages *mem)
{
	unsigned int i;

	for (i = 0; i < mem->num; i++)
		__free_page(mem->pages[i]);
	kvfree(mem->pages);
	mem->pages = NULL;
	mem->num = 0;
}

/* Writes the merged extents of the pages, or only counts them where @out is NULL */
u32 vrdma_pages_extents(const struct vrdma_pages *mem, struct virtio_rdma_extent *out)
{
	u64 start = 0, end = 0;
	u32 num = 0;
	unsigned int i;

	for (i = 0; i < mem->num; i++) {
		u64 addr = page_to_phys(mem->pages[i]);

		if (!num || addr != end) {
			start = addr;
			num++;
		}
		end = addr + PAGE_SIZE;
		if (out) {
			out[num - 1].addr = cpu_to_le64(start);
			out[num - 1].len = cpu_to_le64(end - start);
		}
	}
	return num;
}

static int vrdma_area_describe(struct vrdma_dev *dev, const struct vrdma_area *area, u16 kind,
			       u16 index)
{
	u32 num = vrdma_pages_extents(&area->mem, NULL);
	struct virtio_rdma_set_area *req;
	struct vrdma_cmd *cmd;
	int ret;

	if (num > vrdma_cmd_max_extents(dev, sizeof(*req)))
		return -ENOMEM;
	cmd = vrdma_cmd_alloc(VIRTIO_RDMA_CMD_SET_AREA, sizeof(*req), num, 0);
	if (!cmd)
		return -ENOMEM;
	req = vrdma_cmd_body(cmd);
	req->kind = cpu_to_le16(kind);
	req->index = cpu_to_le16(index);
	req->num_extents = cpu_to_le32(num);
	vrdma_pages_extents(&area->mem, vrdma_cmd_extents(cmd));
	ret = vrdma_cmd_run(dev, cmd);
	vrdma_cmd_free(dev, cmd);
	return ret;
}

/* The area is freed by the caller, after the device has been reset, also when this fails */
int vrdma_area_create(struct vrdma_dev *dev, struct vrdma_area *area, u16 kind, u16 index,
		      size_t size)
{
	int ret;

	ret = vrdma_pages_alloc(&area->mem, size, GFP_KERNEL);
	if (ret)
		return ret;
	area->base = vmap(area->mem.pages, area->mem.num, VM_MAP, PAGE_KERNEL);
	if (!area->base)
		return -ENOMEM;
	return vrdma_area_describe(dev, area, kind, index);
}

void vrdma_area_free(struct vrdma_area *area)
{
	vunmap(area->base);
	area->base = NULL;
	vrdma_pages_free(&area->mem);
}

/* Of a ring that only a process uses, just this is mapped */
struct rxe_queue_buf *vrdma_ring_header(const struct vrdma_ring *ring)
{
	return page_address(ring->mem.pages[0]);
}

/* A ring with room for @min_entries elements: one of its slots always stays empty */
struct vrdma_ring *vrdma_ring_create(u32 min_entries, u32 elem_size)
{
	struct rxe_queue_buf *header;
	struct vrdma_ring *ring;

	ring = kzalloc(sizeof(*ring), GFP_KERNEL);
	if (!ring)
		return NULL;
	kref_init(&ring->ref);
	INIT_LIST_HEAD(&ring->parked);
	ring->entries = roundup_pow_of_two(max(min_entries, 1U) + 1);
	ring->stride = max_t(u32, roundup_pow_of_two(elem_size), SMP_CACHE_BYTES);
	if (vrdma_pages_alloc(&ring->mem, sizeof(*header) + (size_t)ring->entries * ring->stride,
			      GFP_KERNEL_ACCOUNT)) {
		kfree(ring);
		return NULL;
	}
	ring->num_extents = vrdma_pages_extents(&ring->mem, NULL);
	header = vrdma_ring_header(ring);
	header->log2_elem_size = ilog2(ring->stride);
	header->index_mask = ring->entries - 1;
	return ring;
}

/* Makes the ring usable by the kernel */
int vrdma_ring_vmap(struct vrdma_ring *ring)
{
	ring->header = vmap(ring->mem.pages, ring->mem.num, VM_MAP, PAGE_KERNEL);
	return ring->header ? 0 : -ENOMEM;
}

void vrdma_ring_describe(const struct vrdma_ring *ring, struct virtio_rdma_ring_desc *desc)
{
	desc->format = VIRTIO_RDMA_FORMAT_RXE;
	desc->entries = cpu_to_le32(ring->entries);
	desc->stride = cpu_to_le32(ring->stride);
	desc->num_extents = cpu_to_le32(ring->num_extents);
}

/* Has the device use this ring for a CQ or an SRQ, in place of the one that it has */
int vrdma_ring_exchange(struct vrdma_dev *dev, u16 opcode, u32 number,
			const struct vrdma_ring *ring)
{
	struct virtio_rdma_resize_cq *req;	/* that of an SRQ is the same */
	struct vrdma_cmd *cmd;
	int ret;

	static_assert(sizeof(*req) == sizeof(struct virtio_rdma_resize_srq));
	if (ring->num_extents > vrdma_cmd_max_extents(dev, sizeof(*req)))
		return -ENOMEM;
	cmd = vrdma_cmd_alloc(opcode, sizeof(*req), ring->num_extents, 0);
	if (!cmd)
		return -ENOMEM;
	req = vrdma_cmd_body(cmd);
	req->cqn = cpu_to_le32(number);
	vrdma_ring_describe(ring, &req->ring);
	vrdma_pages_extents(&ring->mem, vrdma_cmd_extents(cmd));
	ret = vrdma_cmd_run(dev, cmd);
	vrdma_cmd_free(dev, cmd);
	return ret;
}

static void vrdma_ring_free(struct kref *ref)
{
	struct vrdma_ring *ring = container_of(ref, struct vrdma_ring, ref);

	vunmap(ring->header);
	vrdma_pages_free(&ring->mem);
	kfree(ring);
}

/* Makes the ring mappable by the process that made the call */
int vrdma_ring_map(struct vrdma_ring *ring, struct ib_udata *udata, struct mminfo *info)
{
	struct vrdma_ucontext *uc = rdma_udata_to_drv_context(udata, struct vrdma_ucontext, ibuc);
	size_t size = (size_t)ring->mem.num * PAGE_SIZE;
	int ret;

	ret = rdma_user_mmap_entry_insert(&uc->ibuc, &ring->entry, size);
	if (ret)
		return ret;
	kref_get(&ring->ref);
	ring->mappable = true;
	info->offset = rdma_user_mmap_get_offset(&ring->entry);
	info->size = size;
	return 0;
}

/* The owner's reference. The device no longer uses the ring, or is dead. */
void vrdma_ring_release(struct vrdma_dev *dev, struct vrdma_ring *ring)
{
	if (!ring)
		return;
	if (ring->mappable)
		rdma_user_mmap_entry_remove(&ring->entry);
	if (!vrdma_is_dead(dev)) {
		kref_put(&ring->ref, vrdma_ring_free);
		return;
	}
	mutex_lock(&dev->parked_lock);
	list_add(&ring->parked, &dev->parked_rings);
	mutex_unlock(&dev->parked_lock);
}

void vrdma_mmap_free(struct rdma_user_mmap_entry *entry)
{
	struct vrdma_ring *ring = container_of(entry, struct vrdma_ring, entry);

	kref_put(&ring->ref, vrdma_ring_free);
}

int vrdma_mmap(struct ib_ucontext *ibuc, struct vm_area_struct *vma)
{
	struct rdma_user_mmap_entry *entry;
	struct vrdma_ring *ring;
	int ret;

	entry = rdma_user_mmap_entry_get(ibuc, vma);
	if (!entry)
		return -EINVAL;
	ring = container_of(entry, struct vrdma_ring, entry);
	ret = vm_map_pages_zero(vma, ring->mem.pages, ring->mem.num);
	rdma_user_mmap_entry_put(entry);
	return ret;
}

struct vrdma_parked_umem {
	struct list_head list;
	struct ib_umem *umem;
};

/* Unpins memory that the device no longer uses, unless it is dead and might */
void vrdma_umem_release(struct vrdma_dev *dev, struct ib_umem *umem)
{
	struct vrdma_parked_umem *parked;

	if (!vrdma_is_dead(dev)) {
		ib_umem_release(umem);
		return;
	}
	parked = kmalloc(sizeof(*parked), GFP_KERNEL | __GFP_NOFAIL);
	parked->umem = umem;
	mutex_lock(&dev->parked_lock);
	list_add(&parked->list, &dev->parked_umems);
	mutex_unlock(&dev->parked_lock);
}

/* Pages that were not pinned: as many as a record of one page has room for */
struct vrdma_parked_pages {
	struct list_head list;
	unsigned int num;
	struct page *pages[];
};

#define VRDMA_PARKED_PAGES \
	((PAGE_SIZE - offsetof(struct vrdma_parked_pages, pages)) / sizeof(struct page *))

/* With the lock; NULL without memory */
static struct vrdma_parked_pages *vrdma_parked_room(struct vrdma_dev *dev)
{
	struct vrdma_parked_pages *parked;

	parked = list_first_entry_or_null(&dev->parked_pages, struct vrdma_parked_pages, list);
	if (parked && parked->num < VRDMA_PARKED_PAGES)
		return parked;
	parked = kmalloc(PAGE_SIZE, GFP_NOWAIT | __GFP_NOWARN);
	if (!parked)
		return NULL;
	parked->num = 0;
	list_add(&parked->list, &dev->parked_pages);
	return parked;
}

/*
 * Keeps a page that the kernel takes from a process, and that a dead device might still use. Memory
 * may be short: where there is none to note the page in, nobody ever gets it again.
 */
void vrdma_page_park(struct vrdma_dev *dev, struct page *page)
{
	struct vrdma_parked_pages *parked;

	get_page(page);
	mutex_lock(&dev->parked_lock);
	parked = vrdma_parked_room(dev);
	if (parked)
		parked->pages[parked->num++] = page;
	mutex_unlock(&dev->parked_lock);
	if (!parked)
		dev_warn_once(&dev->vdev->dev, "pages that the device might use are lost\n");
}

static void vrdma_unpark_pages(struct vrdma_dev *dev)
{
	struct vrdma_parked_pages *parked, *next;
	unsigned int i;

	list_for_each_entry_safe(parked, next, &dev->parked_pages, list) {
		for (i = 0; i < parked->num; i++)
			put_page(parked->pages[i]);
		kfree(parked);
		cond_resched();
	}
	INIT_LIST_HEAD(&dev->parked_pages);
}

/* After the virtqueues have gone: frees what a dead device might have used */
void vrdma_unpark(struct vrdma_dev *dev)
{
	struct vrdma_parked_umem *parked, *next_parked;
	struct vrdma_ring *ring, *next_ring;

	list_for_each_entry_safe(ring, next_ring, &dev->parked_rings, parked)
		kref_put(&ring->ref, vrdma_ring_free);
	INIT_LIST_HEAD(&dev->parked_rings);
	list_for_each_entry_safe(parked, next_parked, &dev->parked_umems, list) {
		ib_umem_release(parked->umem);
		kfree(parked);
	}
	INIT_LIST_HEAD(&dev->parked_umems);
	vrdma_unpark_pages(dev);
}
