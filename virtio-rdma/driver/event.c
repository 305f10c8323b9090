// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * Event queues: completions and asynchronous events, taken in interrupt context.
 *
 * Numbers in events come from the device, and an event can arrive for an object that has just
 * been destroyed: objects are looked up under the lock of their table and held while their
 * handler runs; destroying waits for that.
 */
#include <linux/scatterlist.h>
#include <linux/slab.h>

#include "vrdma.h"

/* Events handled in one go */
#define VRDMA_EVENT_BUDGET	256

static void vrdma_qp_event(struct vrdma_dev *dev, u32 qpn, enum ib_event_type type)
{
	struct vrdma_qp *qp = vrdma_qp_get(dev, qpn);
	struct ib_event event = {
		.device = &dev->ibdev,
		.event = type,
	};

	if (!qp)
		return;
	event.element.qp = &qp->ibqp;
	if (qp->ibqp.event_handler)
		qp->ibqp.event_handler(&event, qp->ibqp.qp_context);
	vrdma_qp_put(qp);
}

static void vrdma_cq_error(struct vrdma_dev *dev, u32 cqn)
{
	struct vrdma_cq *cq = vrdma_cq_get(dev, cqn);
	struct ib_event event = {
		.device = &dev->ibdev,
		.event = IB_EVENT_CQ_ERR,
	};

	if (!cq)
		return;
	event.element.cq = &cq->ibcq;
	if (cq->ibcq.event_handler)
		cq->ibcq.event_handler(&event, cq->ibcq.cq_context);
	vrdma_cq_put(cq);
}

static void vrdma_srq_event(struct vrdma_dev *dev, u32 srqn, enum ib_event_type type)
{
	struct vrdma_srq *srq = vrdma_srq_get(dev, srqn);
	struct ib_event event = {
		.device = &dev->ibdev,
		.event = type,
	};

	if (!srq)
		return;
	event.element.srq = &srq->ibsrq;
	if (srq->ibsrq.event_handler)
		srq->ibsrq.event_handler(&event, srq->ibsrq.srq_context);
	vrdma_srq_put(srq);
}

static void vrdma_completion(struct vrdma_dev *dev, u32 cqn)
{
	struct vrdma_cq *cq = vrdma_cq_get(dev, cqn);

	if (!cq)
		return;
	if (cq->ibcq.comp_handler)
		cq->ibcq.comp_handler(&cq->ibcq, cq->ibcq.cq_context);
	vrdma_cq_put(cq);
}

static void vrdma_device_fatal(struct vrdma_dev *dev)
{
	struct ib_event event = {
		.device = &dev->ibdev,
		.event = IB_EVENT_DEVICE_FATAL,
	};

	dev_err(&dev->vdev->dev, "the device reports a fatal error\n");
	if (!ib_device_try_get(&dev->ibdev))
		return;
	ib_dispatch_event(&event);
	ib_device_put(&dev->ibdev);
}

static void vrdma_handle_event(struct vrdma_dev *dev, const struct virtio_rdma_event *event)
{
	u32 number = le32_to_cpu(event->number);

	switch (le16_to_cpu(event->kind)) {
	case VIRTIO_RDMA_EVENT_COMPLETION:
		vrdma_completion(dev, number);
		break;
	case VIRTIO_RDMA_EVENT_CQ_ERROR:
		vrdma_cq_error(dev, number);
		break;
	case VIRTIO_RDMA_EVENT_QP_FATAL:
		vrdma_qp_event(dev, number, IB_EVENT_QP_FATAL);
		break;
	case VIRTIO_RDMA_EVENT_QP_REQUEST_ERROR:
		vrdma_qp_event(dev, number, IB_EVENT_QP_REQ_ERR);
		break;
	case VIRTIO_RDMA_EVENT_QP_ACCESS_ERROR:
		vrdma_qp_event(dev, number, IB_EVENT_QP_ACCESS_ERR);
		break;
	case VIRTIO_RDMA_EVENT_COMM_ESTABLISHED:
		vrdma_qp_event(dev, number, IB_EVENT_COMM_EST);
		break;
	case VIRTIO_RDMA_EVENT_SQ_DRAINED:
		vrdma_qp_event(dev, number, IB_EVENT_SQ_DRAINED);
		break;
	case VIRTIO_RDMA_EVENT_LAST_WQE_REACHED:
		vrdma_qp_event(dev, number, IB_EVENT_QP_LAST_WQE_REACHED);
		break;
	case VIRTIO_RDMA_EVENT_SRQ_ERROR:
		vrdma_srq_event(dev, number, IB_EVENT_SRQ_ERR);
		break;
	case VIRTIO_RDMA_EVENT_SRQ_LIMIT:
		vrdma_srq_event(dev, number, IB_EVENT_SRQ_LIMIT_REACHED);
		break;
	case VIRTIO_RDMA_EVENT_PAGE_FAULT:
		vrdma_odp_fault(dev, event);
		break;
	case VIRTIO_RDMA_EVENT_DEVICE_FATAL:
		vrdma_device_fatal(dev);
		break;
	}
}

static int vrdma_event_post(struct vrdma_eventq *eq, struct virtio_rdma_event *buf)
{
	struct scatterlist sg;

	sg_init_one(&sg, buf, sizeof(*buf));
	return virtqueue_add_inbuf(eq->vq, &sg, 1, buf, GFP_ATOMIC);
}

/* Takes one event and gives its buffer back */
static bool vrdma_event_take(struct vrdma_eventq *eq, struct virtio_rdma_event *event)
{
	struct virtio_rdma_event *buf;
	u32 written;

	buf = virtqueue_get_buf(eq->vq, &written);
	if (!buf)
		return false;
	if (written >= sizeof(*buf))
		*event = *buf;
	else
		memset(event, 0, sizeof(*event));
	vrdma_event_post(eq, buf);
	return true;
}

/* True if the budget is used up: interrupts of the queue stay off then, and there may be more */
static bool vrdma_events_take(struct vrdma_dev *dev, struct vrdma_eventq *eq)
{
	unsigned int budget = VRDMA_EVENT_BUDGET;
	struct virtio_rdma_event event;
	unsigned long flags;

	spin_lock_irqsave(&eq->lock, flags);
	do {
		virtqueue_disable_cb(eq->vq);
		while (!eq->drained && budget && vrdma_event_take(eq, &event)) {
			budget--;
			spin_unlock_irqrestore(&eq->lock, flags);
			vrdma_handle_event(dev, &event);
			spin_lock_irqsave(&eq->lock, flags);
		}
	} while (!eq->drained && budget && !virtqueue_enable_cb(eq->vq));
	if (!eq->drained)
		virtqueue_kick(eq->vq);
	spin_unlock_irqrestore(&eq->lock, flags);
	return !budget;
}

/* Virtqueue callback, in interrupt context */
void vrdma_event_arrived(struct virtqueue *vq)
{
	struct vrdma_dev *dev = vq->vdev->priv;
	struct vrdma_eventq *eq = &dev->eventqs[vq->index - 1];

	if (vrdma_events_take(dev, eq))
		schedule_work(&eq->more);
}

/* Goes on where the interrupt stopped: a device can refill the queue as fast as it is drained */
static void vrdma_events_more(struct work_struct *work)
{
	struct vrdma_eventq *eq = container_of(work, struct vrdma_eventq, more);

	if (vrdma_events_take(eq->vq->vdev->priv, eq))
		schedule_work(&eq->more);
}

/* Before the device is ready; the queues are filled after the RESET command */
int vrdma_events_init(struct vrdma_dev *dev)
{
	unsigned int i;

	for (i = 0; i < dev->num_eventqs; i++) {
		struct vrdma_eventq *eq = &dev->eventqs[i];

		INIT_WORK(&eq->more, vrdma_events_more);
		eq->num_bufs = virtqueue_get_vring_size(eq->vq);
		eq->bufs = kcalloc(eq->num_bufs, sizeof(*eq->bufs), GFP_KERNEL);
		if (!eq->bufs)
			return -ENOMEM;
	}
	return 0;
}

int vrdma_events_fill(struct vrdma_dev *dev)
{
	unsigned int i, j;

	for (i = 0; i < dev->num_eventqs; i++) {
		struct vrdma_eventq *eq = &dev->eventqs[i];
		int ret = 0;

		spin_lock_irq(&eq->lock);
		for (j = 0; j < eq->num_bufs && !ret; j++)
			ret = vrdma_event_post(eq, &eq->bufs[j]);
		virtqueue_kick(eq->vq);
		spin_unlock_irq(&eq->lock);
		if (ret)
			return ret;
	}
	return 0;
}

/* After the reset. An interrupt can still come, and finds nothing. */
void vrdma_events_drain(struct vrdma_dev *dev)
{
	unsigned int i;

	for (i = 0; i < dev->num_eventqs; i++) {
		struct vrdma_eventq *eq = &dev->eventqs[i];

		spin_lock_irq(&eq->lock);
		eq->drained = true;
		while (virtqueue_detach_unused_buf(eq->vq))
			;
		spin_unlock_irq(&eq->lock);
		cancel_work_sync(&eq->more);
	}
}

/* After the virtqueues have gone */
void vrdma_events_free(struct vrdma_dev *dev)
{
	unsigned int i;

	for (i = 0; i < dev->num_eventqs; i++)
		kfree(dev->eventqs[i].bufs);
}
