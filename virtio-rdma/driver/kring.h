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

/* The device's index, which is only ever compared or masked */
static inline u32 vrdma_ring_consumer(const struct vrdma_ring *ring)
{
	return virt_load_acquire(&ring->header->consumer_index) & (ring->entries - 1);
}

static inline u32 vrdma_ring_producer(const struct vrdma_ring *ring)
{
	return virt_load_acquire(&ring->header->producer_index) & (ring->entries - 1);
}

/* Elements before @index become the device's */
static inline void vrdma_ring_publish(struct vrdma_ring *ring, u32 index)
{
	virt_store_release(&ring->header->producer_index, index);
}

/* Elements before @index were taken: the device may write them again */
static inline void vrdma_ring_taken(struct vrdma_ring *ring, u32 index)
{
	virt_store_release(&ring->header->consumer_index, index);
}

#endif
