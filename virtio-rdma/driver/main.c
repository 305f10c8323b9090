// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * virtio_rdma: an RDMA device over virtio.
 *
 * This file binds the virtio device and takes it down again. Order matters in two places: the
 * device touches none of the guest's memory but the virtqueues after a RESET, and nothing that it
 * may know of is freed before it has been reset.
 */
#include <linux/delay.h>
#include <linux/etherdevice.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/virtio_config.h>

#include "compat.h"
#include "doorbell.h"
#include "vrdma.h"

/* Binds the device again after somebody else has unregistered it */
struct vrdma_rebind {
	struct work_struct work;
	struct virtio_device *vdev;
};

struct workqueue_struct *vrdma_wq;

static void vrdma_rebind_work(struct work_struct *work)
{
	struct vrdma_rebind *rebind = container_of(work, struct vrdma_rebind, work);
	struct device *device = &rebind->vdev->dev;

	/* Who unregisters all devices of a driver id goes on until there are none */
	msleep(1000);
	if (device_reprobe(device))
		dev_err(device, "binding again failed\n");
	put_device(device);
	kfree(rebind);
}

/*
 * Last call of the core before it drops the device. Unloading rdma_rxe unregisters every device
 * with its driver id, which is ours too: the device is left without a driver's object then, and
 * gets a new one. Our own reference keeps the memory until vrdma_remove().
 */
void vrdma_dealloc_driver(struct ib_device *ibdev)
{
	struct vrdma_dev *dev = to_vdev(ibdev);
	struct vrdma_rebind *rebind;

	if (test_bit(VRDMA_REMOVING, &dev->state))
		return;
	dev_warn(&dev->vdev->dev, "unregistered from outside, will be back\n");
	rebind = kmalloc(sizeof(*rebind), GFP_KERNEL | __GFP_NOFAIL);
	INIT_WORK(&rebind->work, vrdma_rebind_work);
	rebind->vdev = dev->vdev;
	get_device(&dev->vdev->dev);
	queue_work(vrdma_wq, &rebind->work);
}

static void vrdma_read_config(struct virtio_device *vdev, struct virtio_rdma_config *cfg)
{
	virtio_cread_bytes(vdev, 0, cfg, sizeof(*cfg));
}

/* Nothing is logged for a device that is not ours: id 38 belongs to another type */
static int vrdma_validate(struct virtio_device *vdev)
{
	struct virtio_rdma_config cfg;

	if (!vdev->config->get || !virtio_has_feature(vdev, VIRTIO_F_VERSION_1))
		return -ENODEV;
	vrdma_read_config(vdev, &cfg);
	if (le32_to_cpu(cfg.magic) != VIRTIO_RDMA_MAGIC)
		return -ENODEV;
	if (le16_to_cpu(cfg.version) != VIRTIO_RDMA_ABI_VERSION) {
		dev_err(&vdev->dev, "version %u of the device ABI is not known\n",
			le16_to_cpu(cfg.version));
		return -ENODEV;
	}
	if (virtio_has_feature(vdev, VIRTIO_F_ACCESS_PLATFORM)) {
		dev_err(&vdev->dev, "a vIOMMU or a confidential guest is not supported\n");
		return -EOPNOTSUPP;
	}
	__virtio_clear_bit(vdev, VIRTIO_F_RING_PACKED);
	return 0;
}

static int vrdma_take_config(struct vrdma_dev *dev)
{
	struct virtio_rdma_config cfg;

	vrdma_read_config(dev->vdev, &cfg);
	dev->num_eventqs = le16_to_cpu(cfg.num_event_queues);
	dev->num_doorbellqs = le16_to_cpu(cfg.num_doorbell_queues);
	if (!dev->num_eventqs || !dev->num_doorbellqs) {
		dev_err(&dev->vdev->dev, "the device has too few virtqueues\n");
		return -EINVAL;
	}
	ether_addr_copy(dev->mac, cfg.mac);
	dev->max_mtu = clamp_t(u8, cfg.max_mtu, IB_MTU_256, IB_MTU_4096);
	dev->active_mtu = clamp_t(u8, cfg.active_mtu, IB_MTU_256, dev->max_mtu);
	dev->speed_mbps = le32_to_cpu(cfg.speed_mbps);
	memcpy(&dev->ibdev.node_guid, cfg.node_guid, sizeof(cfg.node_guid));
	return 0;
}

static unsigned int vrdma_num_vqs(const struct vrdma_dev *dev)
{
	return 1 + dev->num_eventqs + dev->num_doorbellqs;
}

static void vrdma_name_vqs(struct vrdma_dev *dev, vq_callback_t **callbacks, const char **names)
{
	unsigned int i;

	callbacks[0] = vrdma_ctrl_done;
	names[0] = "rdma-control";
	for (i = 0; i < dev->num_eventqs; i++) {
		callbacks[1 + i] = vrdma_event_arrived;
		names[1 + i] = "rdma-event";
	}
	/* Doorbell queues carry nothing, so nothing ever comes back */
	for (i = 0; i < dev->num_doorbellqs; i++)
		names[1 + dev->num_eventqs + i] = "rdma-doorbell";
}

static int vrdma_find_queues(struct vrdma_dev *dev)
{
	unsigned int num = vrdma_num_vqs(dev);
	vq_callback_t **callbacks;
	const char **names;
	int ret = -ENOMEM;

	callbacks = kcalloc(num, sizeof(*callbacks), GFP_KERNEL);
	names = kcalloc(num, sizeof(*names), GFP_KERNEL);
	if (callbacks && names) {
		vrdma_name_vqs(dev, callbacks, names);
		ret = vrdma_find_vqs(dev->vdev, num, dev->vqs, callbacks, names);
	}
	kfree(names);
	kfree(callbacks);
	return ret;
}

static int vrdma_init_queues(struct vrdma_dev *dev)
{
	unsigned int i;
	int ret;

	dev->vqs = kcalloc(vrdma_num_vqs(dev), sizeof(*dev->vqs), GFP_KERNEL);
	dev->eventqs = kcalloc(dev->num_eventqs, sizeof(*dev->eventqs), GFP_KERNEL);
	dev->doorbellqs = kcalloc(dev->num_doorbellqs, sizeof(*dev->doorbellqs), GFP_KERNEL);
	if (!dev->vqs || !dev->eventqs || !dev->doorbellqs)
		return -ENOMEM;
	ret = vrdma_find_queues(dev);
	if (ret)
		return ret;
	for (i = 0; i < dev->num_eventqs; i++) {
		struct vrdma_eventq *eq = &dev->eventqs[i];

		eq->vq = dev->vqs[1 + i];
		spin_lock_init(&eq->lock);
	}
	for (i = 0; i < dev->num_doorbellqs; i++)
		dev->doorbellqs[i].vq = dev->vqs[1 + dev->num_eventqs + i];
	ret = vrdma_ctrl_init(dev, dev->vqs[0]) ?: vrdma_events_init(dev);
	if (ret)
		dev->vdev->config->del_vqs(dev->vdev);
	return ret;
}

static int vrdma_create_areas(struct vrdma_dev *dev)
{
	const struct vrdma_attr *attr = &dev->attr;
	unsigned int i;
	int ret;

	for (i = 0; i < dev->num_doorbellqs; i++) {
		struct vrdma_doorbellq *dbq = &dev->doorbellqs[i];

		ret = vrdma_area_create(dev, &dbq->area, VIRTIO_RDMA_AREA_DOORBELL, i,
					vrdma_doorbell_area_size(attr->max_doorbells));
		if (ret)
			return ret;
		vrdma_doorbell_layout(dbq, attr->max_doorbells);
	}
	ret = vrdma_area_create(dev, &dev->arm, VIRTIO_RDMA_AREA_CQ_ARM, 0,
				(size_t)attr->max_cq * VIRTIO_RDMA_ARM_STRIDE);
	if (ret)
		return ret;
	return vrdma_ah_create_area(dev);
}

/* From a device with DRIVER_OK to one that objects can be made on */
static int vrdma_start(struct vrdma_dev *dev)
{
	int ret;

	ret = vrdma_ctrl_call(dev, VIRTIO_RDMA_CMD_RESET, NULL, 0, NULL, 0);
	if (ret)
		return ret;
	ret = vrdma_events_fill(dev);
	if (ret)
		return ret;
	ret = vrdma_query_attr(dev);
	if (ret)
		return ret;
	return vrdma_create_areas(dev);
}

/*
 * Memory that the core or a user in the kernel gave to the device cannot be kept as that of
 * processes is: they free it when a QP was stopped or a region has gone. A device that was given
 * up is reset before they do. Not sooner, since a VMM may wait for its device meanwhile, and with
 * it the guest.
 *
 * virtio_uml is the exception: it stops the device with its virtqueues, and not on a reset.
 */
void vrdma_dev_silence(struct vrdma_dev *dev)
{
	if (!vrdma_is_dead(dev))
		return;
	mutex_lock(&dev->silence_lock);
	if (!test_and_set_bit(VRDMA_SILENT, &dev->state)) {
		virtio_break_device(dev->vdev);
		virtio_reset_device(dev->vdev);
	}
	mutex_unlock(&dev->silence_lock);
}

/* After this the device knows no memory of ours, and nothing is called back */
static void vrdma_stop(struct vrdma_dev *dev)
{
	struct virtio_device *vdev = dev->vdev;

	if (!vrdma_is_dead(dev) && !virtqueue_is_broken(dev->ctrl.vq))
		vrdma_ctrl_call(dev, VIRTIO_RDMA_CMD_RESET, NULL, 0, NULL, 0);
	virtio_reset_device(vdev);
	vrdma_ctrl_drain(dev);
	vrdma_events_drain(dev);
	vdev->config->del_vqs(vdev);
	vrdma_ctrl_free(dev);
}

static void vrdma_free(struct vrdma_dev *dev)
{
	unsigned int i;

	vrdma_unpark(dev);
	vrdma_odp_exit(dev);
	if (dev->eventqs)
		vrdma_events_free(dev);
	for (i = 0; dev->doorbellqs && i < dev->num_doorbellqs; i++)
		vrdma_area_free(&dev->doorbellqs[i].area);
	vrdma_area_free(&dev->arm);
	vrdma_ah_exit(dev);
	xa_destroy(&dev->cqs);
	xa_destroy(&dev->qps);
	xa_destroy(&dev->srqs);
	xa_destroy(&dev->odps);
	kfree(dev->doorbellqs);
	kfree(dev->eventqs);
	kfree(dev->vqs);
}

static struct vrdma_dev *vrdma_alloc(struct virtio_device *vdev)
{
	struct vrdma_dev *dev = ib_alloc_device(vrdma_dev, ibdev);

	if (!dev)
		return NULL;
	dev->vdev = vdev;
	dev->ibdev.dev.parent = &vdev->dev;
	spin_lock_init(&dev->ctrl.lock);
	init_waitqueue_head(&dev->ctrl.room);
	INIT_LIST_HEAD(&dev->ctrl.drained);
	spin_lock_init(&dev->netdev_lock);
	INIT_LIST_HEAD(&dev->old_netdevs);
	mutex_init(&dev->silence_lock);
	mutex_init(&dev->parked_lock);
	INIT_LIST_HEAD(&dev->parked_rings);
	INIT_LIST_HEAD(&dev->parked_umems);
	INIT_LIST_HEAD(&dev->parked_pages);
	vrdma_ah_init(dev);
	xa_init_flags(&dev->cqs, XA_FLAGS_LOCK_IRQ);
	xa_init_flags(&dev->qps, XA_FLAGS_LOCK_IRQ);
	xa_init_flags(&dev->srqs, XA_FLAGS_LOCK_IRQ);
	xa_init_flags(&dev->odps, XA_FLAGS_LOCK_IRQ);
	vdev->priv = dev;
	return dev;
}

static int vrdma_probe(struct virtio_device *vdev)
{
	struct vrdma_dev *dev;
	int ret;

	dev = vrdma_alloc(vdev);
	if (!dev)
		return -ENOMEM;
	ret = vrdma_take_config(dev);
	if (ret)
		goto err_free;
	ret = vrdma_init_queues(dev);
	if (ret)
		goto err_free;
	virtio_device_ready(vdev);
	ret = vrdma_start(dev);
	if (ret)
		goto err_stop;
	vrdma_set_ops(dev);
	ret = vrdma_netdev_init(dev);
	if (ret)
		goto err_stop;
	get_device(&dev->ibdev.dev);
	ret = ib_register_device(&dev->ibdev, VRDMA_DEV_NAME, NULL);
	if (ret)
		goto err_netdev;
	vrdma_port_changed(dev, VRDMA_PORT_RESCAN);
	return 0;

err_netdev:
	set_bit(VRDMA_REMOVING, &dev->state);
	put_device(&dev->ibdev.dev);
	vrdma_netdev_exit(dev);
	cancel_work_sync(&dev->port_work);
err_stop:
	vrdma_stop(dev);
err_free:
	set_bit(VRDMA_REMOVING, &dev->state);
	vrdma_free(dev);
	ib_dealloc_device(&dev->ibdev);
	dev_err(&vdev->dev, "probe failed: %d\n", ret);
	return ret;
}

/*
 * Unregistering takes the contexts of all processes apart, with commands to a device that still
 * works, or with none to one that does not. It does nothing if somebody else has done it.
 */
static void vrdma_remove(struct virtio_device *vdev)
{
	struct vrdma_dev *dev = vdev->priv;

	set_bit(VRDMA_REMOVING, &dev->state);
	ib_unregister_device(&dev->ibdev);
	vrdma_netdev_exit(dev);
	vrdma_stop(dev);
	cancel_work_sync(&dev->port_work);
	vrdma_free(dev);
	put_device(&dev->ibdev.dev);
	vdev->priv = NULL;
}

/* Interrupt context */
static void vrdma_config_changed(struct virtio_device *vdev)
{
	vrdma_port_changed(vdev->priv, VRDMA_PORT_CONFIG);
}

#ifdef CONFIG_PM_SLEEP
/* Objects do not survive it, and processes should not lose theirs unasked */
static int vrdma_freeze(struct virtio_device *vdev)
{
	dev_err(&vdev->dev, "suspend is not supported: unbind the device first\n");
	return -EBUSY;
}
#endif

static const struct virtio_device_id vrdma_ids[] = {
	{ VIRTIO_RDMA_ID, VIRTIO_DEV_ANY_ID },
	{ VIRTIO_RDMA_ID_ALT, VIRTIO_DEV_ANY_ID },
	{ 0 },
};
MODULE_DEVICE_TABLE(virtio, vrdma_ids);

static const unsigned int vrdma_features[] = {
	VIRTIO_RDMA_F_ON_DEMAND,
};

static struct virtio_driver vrdma_driver = {
	.driver.name = VRDMA_DRV_NAME,
	.driver.owner = THIS_MODULE,
	.id_table = vrdma_ids,
	.feature_table = vrdma_features,
	/* The only one depends on the kernel */
	.feature_table_size = IS_ENABLED(CONFIG_INFINIBAND_ON_DEMAND_PAGING) ?
			      ARRAY_SIZE(vrdma_features) : 0,
	.validate = vrdma_validate,
	.probe = vrdma_probe,
	.remove = vrdma_remove,
	.config_changed = vrdma_config_changed,
#ifdef CONFIG_PM_SLEEP
	.freeze = vrdma_freeze,
#endif
};

static int __init vrdma_init(void)
{
	int ret;

	vrdma_wq = alloc_workqueue(VRDMA_DRV_NAME, WQ_UNBOUND, 0);
	if (!vrdma_wq)
		return -ENOMEM;
	ret = register_virtio_driver(&vrdma_driver);
	if (ret)
		destroy_workqueue(vrdma_wq);
	return ret;
}
module_init(vrdma_init);

static void __exit vrdma_exit(void)
{
	unregister_virtio_driver(&vrdma_driver);
	destroy_workqueue(vrdma_wq);
}
module_exit(vrdma_exit);

MODULE_DESCRIPTION("Virtio RDMA driver of Freeflow");
MODULE_AUTHOR("The Freeflow authors");
MODULE_VERSION("0.1.0");	/* that of dkms.conf */
MODULE_LICENSE("Dual MIT/GPL");
