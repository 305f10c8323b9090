/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/*
 * The kernel's own end of a ring (docs/device.md, 6). The caller holds the lock of its end.
 *
 * Barriers are those towards a host with several CPUs: a guest kernel built for one CPU needs
 * them as well.
 */
#ifndef VRDMA_KRING_H
#define VRDMA_KRING_H

#include <asm/barrier.h>

#include "vrdma.h"

static inline void *vrdma_ring_element(const struct vrdma_ring *ring, u32 index)
{
	return ring->header->data + (size_t)index * ring->stride;
}

static inline u32 vrdma_ring_next(const struct vrdma_ring *ring, u32 index)
{
	return (index + 1) & (ring->entries - 1);
}

/* Indices are masked: those of the device are only its word */
static inline u32 vrdma_ring_consumer(const struct vrdma_ring *ring)
{
	/* Of a work ring: elements before it are free to be written */
	return virt_load_acquire(&ring->header->consumer_index) & (ring->entries - 1);
}

static inline u32 vrdma_ring_producer(const struct vrdma_ring *ring)
{
	/* Of a completion ring: elements before it were written */
	return virt_load_acquire(&ring->header->producer_index) & (ring->entries - 1);
}

static inline void vrdma_ring_publish(struct vrdma_ring *ring, u32 index)
{
	/* Elements before it were written: they become the device's */
	virt_store_release(&ring->header->producer_index, index);
}

static inline void vrdma_ring_taken(struct vrdma_ring *ring, u32 index)
{
	/* Elements before it were read: the device may write them again */
	virt_store_release(&ring->header->consumer_index, index);
}

#endif
