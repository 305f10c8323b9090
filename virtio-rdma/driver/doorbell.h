/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/*
 * Doorbells and arm words: the words that driver and device both change while they run
 * (docs/device.md, 4.1 and 4.2).
 *
 * The bitmaps are little-endian 64-bit words, which on the machines that Kconfig allows is what
 * bit operations on an array of long work on.
 */
#ifndef VRDMA_DOORBELL_H
#define VRDMA_DOORBELL_H

#include <linux/compiler.h>
#include <linux/virtio.h>

#include "compat.h"
#include "vrdma.h"

static inline size_t vrdma_summary_size(u32 num)
{
	return DIV_ROUND_UP(DIV_ROUND_UP(num, 64), 64) * sizeof(u64);
}

static inline size_t vrdma_bitmap_offset(u32 num)
{
	return VIRTIO_RDMA_DB_SUMMARY + ALIGN(vrdma_summary_size(num), 64);
}

static inline size_t vrdma_doorbell_area_size(u32 num)
{
	return vrdma_bitmap_offset(num) + DIV_ROUND_UP(num, 64) * sizeof(u64);
}

static inline void vrdma_doorbell_layout(struct vrdma_doorbellq *dbq, u32 num)
{
	dbq->sleeping = dbq->area.base + VIRTIO_RDMA_DB_SLEEPING;
	dbq->summary = dbq->area.base + VIRTIO_RDMA_DB_SUMMARY;
	dbq->bitmap = dbq->area.base + vrdma_bitmap_offset(num);
}

/* The producer index of the send ring was written before this. Both bit operations are full
 * barriers: the device finds the bit, or we find it asleep.
 */
static inline void vrdma_doorbell_ring(struct vrdma_doorbellq *dbq, u32 doorbell)
{
	vrdma_test_and_set_bit(doorbell, dbq->bitmap);
	vrdma_test_and_set_bit(doorbell / 64, dbq->summary);
	if (READ_ONCE(*dbq->sleeping))
		virtqueue_notify(dbq->vq);
}

static inline void vrdma_arm(u32 *word, bool solicited_only)
{
	if (solicited_only)
		vrdma_cmpxchg(word, VIRTIO_RDMA_ARM_NONE, VIRTIO_RDMA_ARM_SOLICITED);
	else
		xchg(word, VIRTIO_RDMA_ARM_NEXT);
	/* Whoever looks at the ring after this sees what the device wrote before it saw the word */
	virt_mb();
}

#endif
