// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * The control queue: commands that sleep until the device has answered.
 *
 * Waiting cannot be interrupted, since a command that is under way names memory that must stay
 * until its outcome is known. It is bounded instead: a device that does not answer is declared
 * dead, after which every command fails at once, and memory that the device may still know is
 * kept ("parked") until the device has been reset.
 */
#include <linux/mm.h>
#include <linux/moduleparam.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>

#include "vrdma.h"

static unsigned int command_timeout = 60;
module_param(command_timeout, uint, 0644);
MODULE_PARM_DESC(command_timeout, "seconds after which a device that does not answer is given up");

/* A request that is contiguous, and the response */
#define VRDMA_CMD_SMALL_SG	2

enum vrdma_cmd_state {
	VRDMA_CMD_IDLE,
	VRDMA_CMD_QUEUED,
	VRDMA_CMD_ABANDONED,	/* queued, and nobody waits any more */
	VRDMA_CMD_DONE,
};

struct vrdma_cmd {
	struct completion done;
	struct list_head drained;
	enum vrdma_cmd_state state;
	u32 body_len;
	u32 req_len;
	u32 resp_len;
	u32 written;
	struct virtio_rdma_ctrl_hdr *req;
	struct virtio_rdma_ctrl_resp *resp;
	struct scatterlist *sg;		/* both, ready for the virtqueue */
	unsigned int num_sg;
	struct scatterlist small_sg[VRDMA_CMD_SMALL_SG];
};

int vrdma_ctrl_init(struct vrdma_dev *dev, struct virtqueue *vq)
{
	struct vrdma_ctrl *ctrl = &dev->ctrl;
	unsigned int size = virtqueue_get_vring_size(vq);

	if (size < 4)
		return -EINVAL;
	ctrl->vq = vq;
	ctrl->max_request = min_t(size_t, VIRTIO_RDMA_MAX_REQUEST,
				  (size_t)(size - 2) * PAGE_SIZE);
	return 0;
}

static void vrdma_cmd_destroy(struct vrdma_cmd *cmd)
{
	if (cmd->sg != cmd->small_sg)
		kfree(cmd->sg);
	kvfree(cmd->req);
	kfree(cmd->resp);
	kfree(cmd);
}

/* Memory from vmalloc is page-aligned, and contiguous within its pages only */
static int vrdma_cmd_alloc_sg(struct vrdma_cmd *cmd, gfp_t gfp)
{
	cmd->sg = cmd->small_sg;
	cmd->num_sg = VRDMA_CMD_SMALL_SG;
	if (is_vmalloc_addr(cmd->req)) {
		cmd->num_sg = DIV_ROUND_UP(cmd->req_len, PAGE_SIZE) + 1;
		cmd->sg = kmalloc_array(cmd->num_sg, sizeof(*cmd->sg), gfp);
	}
	return cmd->sg ? 0 : -ENOMEM;
}

static void vrdma_cmd_fill_sg(struct vrdma_cmd *cmd)
{
	struct scatterlist *sg = cmd->sg;
	void *at = cmd->req;
	u32 left = cmd->req_len;

	sg_init_table(sg, cmd->num_sg);
	if (!is_vmalloc_addr(at)) {
		sg_set_buf(sg++, at, left);
		left = 0;
	}
	while (left) {
		u32 len = min_t(u32, left, PAGE_SIZE);

		sg_set_page(sg++, vmalloc_to_page(at), len, 0);
		at += len;
		left -= len;
	}
	/* Two lists: what the device reads, and what it writes */
	sg_mark_end(sg - 1);
	sg_set_buf(sg, cmd->resp, cmd->resp_len);
}

static struct vrdma_cmd *vrdma_cmd_alloc_gfp(u16 opcode, size_t body_len, u32 num_extents,
					     size_t result_len, gfp_t gfp)
{
	size_t req_len = sizeof(struct virtio_rdma_ctrl_hdr) + body_len +
			 num_extents * sizeof(struct virtio_rdma_extent);
	struct vrdma_cmd *cmd;

	if (req_len > VIRTIO_RDMA_MAX_REQUEST)
		return NULL;
	cmd = kzalloc(sizeof(*cmd), gfp);
	if (!cmd)
		return NULL;
	init_completion(&cmd->done);
	cmd->body_len = body_len;
	cmd->req_len = req_len;
	cmd->resp_len = sizeof(*cmd->resp) + result_len;
	cmd->req = req_len > PAGE_SIZE ? kvzalloc(req_len, gfp) : kzalloc(req_len, gfp);
	cmd->resp = kzalloc(cmd->resp_len, gfp);
	if (!cmd->req || !cmd->resp || vrdma_cmd_alloc_sg(cmd, gfp)) {
		vrdma_cmd_destroy(cmd);
		return NULL;
	}
	vrdma_cmd_fill_sg(cmd);
	cmd->req->opcode = cpu_to_le16(opcode);
	cmd->req->length = cpu_to_le32(req_len);
	return cmd;
}

struct vrdma_cmd *vrdma_cmd_alloc(u16 opcode, size_t body_len, u32 num_extents,
				  size_t result_len)
{
	return vrdma_cmd_alloc_gfp(opcode, body_len, num_extents, result_len, GFP_KERNEL);
}

void *vrdma_cmd_body(struct vrdma_cmd *cmd)
{
	return cmd->req + 1;
}

struct virtio_rdma_extent *vrdma_cmd_extents(struct vrdma_cmd *cmd)
{
	return vrdma_cmd_body(cmd) + cmd->body_len;
}

const void *vrdma_cmd_result(const struct vrdma_cmd *cmd)
{
	return cmd->resp + 1;
}

/* Has a small command that was not submitted end after so many extents */
void vrdma_cmd_shrink(struct vrdma_cmd *cmd, u32 num_extents)
{
	cmd->req_len = sizeof(*cmd->req) + cmd->body_len +
		       num_extents * sizeof(struct virtio_rdma_extent);
	cmd->req->length = cpu_to_le32(cmd->req_len);
	cmd->sg[0].length = cmd->req_len;
}

/* How many extents fit into one request beside this structure */
u32 vrdma_cmd_max_extents(struct vrdma_dev *dev, size_t body_len)
{
	return (dev->ctrl.max_request - sizeof(struct virtio_rdma_ctrl_hdr) - body_len) /
	       sizeof(struct virtio_rdma_extent);
}

/* A command that the device still has is freed when it comes back, or after the reset */
void vrdma_cmd_free(struct vrdma_dev *dev, struct vrdma_cmd *cmd)
{
	struct vrdma_ctrl *ctrl = &dev->ctrl;
	unsigned long flags;
	bool queued;

	if (!cmd)
		return;
	spin_lock_irqsave(&ctrl->lock, flags);
	queued = cmd->state == VRDMA_CMD_QUEUED;
	if (queued)
		cmd->state = VRDMA_CMD_ABANDONED;
	spin_unlock_irqrestore(&ctrl->lock, flags);
	if (!queued)
		vrdma_cmd_destroy(cmd);
}

/* Virtqueue callback, in interrupt context */
void vrdma_ctrl_done(struct virtqueue *vq)
{
	struct vrdma_dev *dev = vq->vdev->priv;
	struct vrdma_ctrl *ctrl = &dev->ctrl;
	struct vrdma_cmd *cmd;
	unsigned long flags;
	u32 written;

	spin_lock_irqsave(&ctrl->lock, flags);
	do {
		virtqueue_disable_cb(vq);
		while ((cmd = virtqueue_get_buf(vq, &written))) {
			if (cmd->state == VRDMA_CMD_ABANDONED) {
				/* Not on the way of a device that works */
				spin_unlock_irqrestore(&ctrl->lock, flags);
				vrdma_cmd_destroy(cmd);
				spin_lock_irqsave(&ctrl->lock, flags);
				continue;
			}
			cmd->written = written;
			cmd->state = VRDMA_CMD_DONE;
			complete(&cmd->done);
		}
	} while (!virtqueue_enable_cb(vq));
	spin_unlock_irqrestore(&ctrl->lock, flags);
	wake_up(&ctrl->room);
}

static int vrdma_cmd_queue(struct vrdma_dev *dev, struct vrdma_cmd *cmd)
{
	struct scatterlist *sgs[] = { &cmd->sg[0], &cmd->sg[cmd->num_sg - 1] };
	struct vrdma_ctrl *ctrl = &dev->ctrl;
	unsigned long flags;
	bool kick = false;
	int ret;

	spin_lock_irqsave(&ctrl->lock, flags);
	ret = vrdma_is_dead(dev) ? -EIO :
	      virtqueue_add_sgs(ctrl->vq, sgs, 1, 1, cmd, GFP_ATOMIC);
	if (!ret) {
		cmd->state = VRDMA_CMD_QUEUED;
		kick = virtqueue_kick_prepare(ctrl->vq);
	}
	spin_unlock_irqrestore(&ctrl->lock, flags);
	if (kick)
		virtqueue_notify(ctrl->vq);
	return ret;
}

static bool vrdma_cmd_took_too_long(unsigned long start)
{
	return time_after(jiffies, start + (unsigned long)READ_ONCE(command_timeout) * HZ);
}

/* Hands the command to the device; sleeps while the virtqueue is full */
int vrdma_cmd_submit(struct vrdma_dev *dev, struct vrdma_cmd *cmd)
{
	unsigned long start = jiffies;
	int ret;

	while ((ret = vrdma_cmd_queue(dev, cmd)) == -ENOSPC) {
		if (vrdma_cmd_took_too_long(start)) {
			vrdma_dev_fail(dev, "the control queue stays full");
			ret = -EIO;
			break;
		}
		/* The answers that make room may be there without their interrupt */
		if (!wait_event_timeout(dev->ctrl.room, dev->ctrl.vq->num_free >= cmd->num_sg ||
					vrdma_is_dead(dev), HZ))
			vrdma_ctrl_done(dev->ctrl.vq);
	}
	if (ret && virtqueue_is_broken(dev->ctrl.vq))
		vrdma_dev_fail(dev, "the control queue is broken");
	return ret;
}

static int vrdma_status_to_errno(u32 status)
{
	switch (status) {
	case VIRTIO_RDMA_STATUS_OK:
		return 0;
	case VIRTIO_RDMA_STATUS_NO_RESOURCES:
		return -ENOMEM;
	case VIRTIO_RDMA_STATUS_BUSY:
		return -EBUSY;
	case VIRTIO_RDMA_STATUS_UNSUPPORTED:
		return -EOPNOTSUPP;
	case VIRTIO_RDMA_STATUS_NOT_PERMITTED:
		return -EPERM;
	case VIRTIO_RDMA_STATUS_BAD_ADDRESS:
		return -EFAULT;
	case VIRTIO_RDMA_STATUS_INVALID:
	case VIRTIO_RDMA_STATUS_NOT_FOUND:
	case VIRTIO_RDMA_STATUS_BAD_STATE:
	default:
		return -EINVAL;
	}
}

static int vrdma_cmd_outcome(struct vrdma_dev *dev, const struct vrdma_cmd *cmd)
{
	u32 status, length;
	int ret;

	if (cmd->written < sizeof(*cmd->resp))
		goto malformed;
	status = le32_to_cpu(cmd->resp->status);
	length = le32_to_cpu(cmd->resp->length);
	ret = vrdma_status_to_errno(status);
	if (!ret && (length < cmd->resp_len || cmd->written < cmd->resp_len))
		goto malformed;
	if (ret)
		dev_dbg(&dev->vdev->dev, "command %#06x: status %u\n",
			le16_to_cpu(cmd->req->opcode), status);
	return ret;

malformed:
	dev_err_ratelimited(&dev->vdev->dev, "command %#06x: malformed answer of %u bytes\n",
			    le16_to_cpu(cmd->req->opcode), cmd->written);
	return -EIO;
}

/*
 * Looks after a command that takes long, so that an interrupt or a notification that was lost on
 * its way costs a moment, not the device. Which of the two it was is worth a line: neither is lost
 * by a VMM and a kernel that work.
 */
static void vrdma_ctrl_look(struct vrdma_dev *dev, struct vrdma_cmd *cmd)
{
	struct virtqueue *vq = dev->ctrl.vq;

	if (completion_done(&cmd->done))
		return;
	vrdma_ctrl_done(vq);
	if (completion_done(&cmd->done)) {
		dev_info_once(&dev->vdev->dev, "found an answer that no interrupt had told of\n");
		return;
	}
	dev_info_once(&dev->vdev->dev, "a command takes long: notifying the device again\n");
	virtqueue_notify(vq);
}

/* Sleeps until the device has answered a command that was submitted */
int vrdma_cmd_wait(struct vrdma_dev *dev, struct vrdma_cmd *cmd)
{
	u16 opcode = le16_to_cpu(cmd->req->opcode);
	unsigned long start = jiffies;
	bool warned = false;

	while (!wait_for_completion_timeout(&cmd->done, VRDMA_CMD_LOOK)) {
		vrdma_ctrl_look(dev, cmd);
		if (virtqueue_is_broken(dev->ctrl.vq))
			vrdma_dev_fail(dev, "the control queue is broken");
		else if (vrdma_cmd_took_too_long(start))
			vrdma_dev_fail(dev, "a command got no answer");
		if (vrdma_is_dead(dev))
			return -EIO;
		if (!warned && time_after(jiffies, start + VRDMA_CMD_WARN)) {
			warned = true;
			dev_warn(&dev->vdev->dev, "command %#06x has waited for %u s\n", opcode,
				 VRDMA_CMD_WARN / HZ);
		}
	}
	return vrdma_cmd_outcome(dev, cmd);
}

int vrdma_cmd_run(struct vrdma_dev *dev, struct vrdma_cmd *cmd)
{
	int ret;

	might_sleep();
	ret = vrdma_cmd_submit(dev, cmd);
	if (ret)
		return ret;
	return vrdma_cmd_wait(dev, cmd);
}

/* Runs a command once more, after the last time has ended; allocates nothing */
int vrdma_cmd_again(struct vrdma_dev *dev, struct vrdma_cmd *cmd)
{
	/* The device may have it still */
	if (vrdma_is_dead(dev))
		return -EIO;
	reinit_completion(&cmd->done);
	cmd->written = 0;
	return vrdma_cmd_run(dev, cmd);
}

/* One command without extents */
int vrdma_ctrl_call(struct vrdma_dev *dev, u16 opcode, const void *body, size_t body_len,
		    void *result, size_t result_len)
{
	struct vrdma_cmd *cmd;
	int ret;

	cmd = vrdma_cmd_alloc(opcode, body_len, 0, result_len);
	if (!cmd)
		return -ENOMEM;
	if (body_len)
		memcpy(vrdma_cmd_body(cmd), body, body_len);
	ret = vrdma_cmd_run(dev, cmd);
	if (!ret && result_len)
		memcpy(result, vrdma_cmd_result(cmd), result_len);
	vrdma_cmd_free(dev, cmd);
	return ret;
}

/* A command that does not fail for want of memory */
static int vrdma_ctrl_insist(struct vrdma_dev *dev, u16 opcode, const void *body,
			     size_t body_len)
{
	struct vrdma_cmd *cmd;
	int ret;

	cmd = vrdma_cmd_alloc_gfp(opcode, body_len, 0, 0, GFP_KERNEL | __GFP_NOFAIL);
	memcpy(vrdma_cmd_body(cmd), body, body_len);
	ret = vrdma_cmd_run(dev, cmd);
	vrdma_cmd_free(dev, cmd);
	return ret;
}

/*
 * A command that only takes something back. A device that refuses it is not to be trusted with
 * memory and is given up.
 */
void vrdma_ctrl_must(struct vrdma_dev *dev, u16 opcode, const void *body, size_t body_len)
{
	if (vrdma_ctrl_insist(dev, opcode, body, body_len))
		vrdma_dev_fail(dev, "the device does not let go of an object");
}

/*
 * Destroys an object of the device. It always goes on our side: the core has seen to it that
 * nothing uses it, and while a process ends it would keep an object that cannot be destroyed for
 * ever. Memory of the object goes through vrdma_ring_release() and the like, which park it where
 * the device is dead.
 */
void vrdma_ctrl_destroy(struct vrdma_dev *dev, u16 opcode, u32 number)
{
	struct virtio_rdma_object_req req = { .number = cpu_to_le32(number) };

	vrdma_ctrl_must(dev, opcode, &req, sizeof(req));
}

/* The same for an object that others may still use: then it stays, and the answer is -EBUSY */
int vrdma_ctrl_destroy_unused(struct vrdma_dev *dev, u16 opcode, u32 number)
{
	struct virtio_rdma_object_req req = { .number = cpu_to_le32(number) };
	int ret;

	ret = vrdma_ctrl_insist(dev, opcode, &req, sizeof(req));
	if (ret == -EBUSY)
		return ret;
	if (ret)
		vrdma_dev_fail(dev, "the device does not let go of an object");
	return 0;
}

/* Gives the device up. Idempotent. */
void vrdma_dev_fail(struct vrdma_dev *dev, const char *why)
{
	struct ib_event event = {
		.device = &dev->ibdev,
		.event = IB_EVENT_DEVICE_FATAL,
	};

	if (test_and_set_bit(VRDMA_DEAD, &dev->state))
		return;
	dev_err(&dev->vdev->dev, "%s: the device is given up until it is bound again\n", why);
	wake_up(&dev->ctrl.room);
	if (!ib_device_try_get(&dev->ibdev))
		return;
	ib_dispatch_event(&event);
	ib_device_put(&dev->ibdev);
}

/* After the reset: takes back what the device never gave back */
void vrdma_ctrl_drain(struct vrdma_dev *dev)
{
	struct vrdma_ctrl *ctrl = &dev->ctrl;
	struct vrdma_cmd *cmd;

	spin_lock_irq(&ctrl->lock);
	while ((cmd = virtqueue_detach_unused_buf(ctrl->vq)))
		list_add(&cmd->drained, &ctrl->drained);
	spin_unlock_irq(&ctrl->lock);
}

/* After the virtqueues have gone: some transports stop the device only then */
void vrdma_ctrl_free(struct vrdma_dev *dev)
{
	struct vrdma_cmd *cmd, *next;

	list_for_each_entry_safe(cmd, next, &dev->ctrl.drained, drained)
		vrdma_cmd_destroy(cmd);
	INIT_LIST_HEAD(&dev->ctrl.drained);
}
