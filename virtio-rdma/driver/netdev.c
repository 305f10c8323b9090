// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * The network interface that the device rides beside, and the port's state, which follows it.
 *
 * The interface is the one with the MAC of the configuration space, in any network namespace,
 * whenever it appears, and one of a device rather than one made by software. A bridge, bond or
 * VLAN can share that MAC; the interface below them is meant, since the core finds the addresses
 * of those above by itself.
 */
#include <linux/etherdevice.h>
#include <linux/if_arp.h>
#include <linux/rtnetlink.h>
#include <linux/slab.h>
#include <linux/user_namespace.h>
#include <linux/virtio_config.h>
#include <net/net_namespace.h>

#include "compat.h"
#include "vrdma.h"

/* How well an interface suits; what is higher wins */
enum vrdma_fit {
	VRDMA_FIT_NONE,
	VRDMA_FIT_VIRTUAL,	/* made by software */
	VRDMA_FIT_REAL,		/* of a device */
};

static bool vrdma_netdev_has_mac(const struct vrdma_dev *dev, const struct net_device *ndev)
{
	if (ether_addr_equal(ndev->dev_addr, dev->mac))
		return true;
	/* A bond gives its own MAC to the interfaces in it */
	return netif_is_lag_port(ndev) && ether_addr_equal(ndev->perm_addr, dev->mac);
}

/*
 * Whoever has a network namespace can make an interface with any MAC in it. That never wins over
 * one of a device, and does not count at all where the namespace is an unprivileged user's.
 */
static enum vrdma_fit vrdma_netdev_fit(const struct vrdma_dev *dev, const struct net_device *ndev)
{
	if (!ndev || ndev->type != ARPHRD_ETHER || ndev->reg_state != NETREG_REGISTERED ||
	    !list_empty(&ndev->adj_list.lower) || !vrdma_netdev_has_mac(dev, ndev))
		return VRDMA_FIT_NONE;
	if (ndev->dev.parent)
		return VRDMA_FIT_REAL;
	return dev_net(ndev)->user_ns == &init_user_ns ? VRDMA_FIT_VIRTUAL : VRDMA_FIT_NONE;
}

/* An interface that we were paired with, or one above it, until its GIDs are deleted */
struct vrdma_old_netdev {
	struct list_head list;
	struct net_device *ndev;
};

static void vrdma_netdev_retire_one(struct vrdma_dev *dev, struct net_device *ndev)
{
	struct vrdma_old_netdev *old;

	old = kmalloc(sizeof(*old), GFP_KERNEL | __GFP_NOFAIL);
	old->ndev = ndev;
	dev_hold(ndev);
	spin_lock(&dev->netdev_lock);
	list_add(&old->list, &dev->old_netdevs);
	spin_unlock(&dev->netdev_lock);
}

static int vrdma_netdev_retire_upper(struct net_device *upper, struct netdev_nested_priv *priv)
{
	vrdma_netdev_retire_one(priv->data, upper);
	return 0;
}

/*
 * The core deletes the GIDs of interfaces that are unregistered, but not of those that live on,
 * nor of those above them. Under RTNL walking may sleep.
 */
static void vrdma_netdev_retire(struct vrdma_dev *dev, struct net_device *ndev)
{
	struct netdev_nested_priv priv = { .data = dev };

	if (!VRDMA_CAN_DELETE_GIDS || test_bit(VRDMA_REMOVING, &dev->state) ||
	    ndev->reg_state != NETREG_REGISTERED)
		return;
	vrdma_netdev_retire_one(dev, ndev);
	netdev_walk_all_upper_dev_rcu(ndev, vrdma_netdev_retire_upper, &priv);
}

static void vrdma_netdev_forget(struct vrdma_dev *dev, bool delete_gids)
{
	struct vrdma_old_netdev *old, *next;
	LIST_HEAD(olds);

	spin_lock(&dev->netdev_lock);
	list_splice_init(&dev->old_netdevs, &olds);
	spin_unlock(&dev->netdev_lock);
	list_for_each_entry_safe(old, next, &olds, list) {
		if (delete_gids)
			vrdma_delete_gids(&dev->ibdev, VRDMA_PORT, old->ndev);
		dev_put(old->ndev);
		kfree(old);
	}
}

static void vrdma_netdev_pair(struct vrdma_dev *dev, struct net_device *ndev)
{
	if (dev->netdev)
		vrdma_netdev_retire(dev, dev->netdev);
	spin_lock(&dev->netdev_lock);
	dev->netdev = ndev;
	spin_unlock(&dev->netdev_lock);
	vrdma_port_changed(dev, VRDMA_PORT_RESCAN);
}

/* The one that suits best, of those that suit equally the first */
static struct net_device *vrdma_netdev_search(struct vrdma_dev *dev)
{
	struct net_device *ndev, *best = NULL;
	struct net *net;

	down_read(&net_rwsem);
	for_each_net(net) {
		for_each_netdev(net, ndev) {
			if (vrdma_netdev_fit(dev, ndev) > vrdma_netdev_fit(dev, best))
				best = ndev;
		}
	}
	up_read(&net_rwsem);
	return best;
}

/* Called under RTNL, which is what makes comparisons with dev->netdev safe here */
static int vrdma_netdev_event(struct notifier_block *nb, unsigned long event, void *arg)
{
	struct vrdma_dev *dev = container_of(nb, struct vrdma_dev, netdev_nb);
	struct net_device *ndev = netdev_notifier_info_to_dev(arg);
	bool ours = ndev == dev->netdev;

	switch (event) {
	case NETDEV_UNREGISTER:
		if (ours)
			vrdma_netdev_pair(dev, test_bit(VRDMA_REMOVING, &dev->state) ?
					       NULL : vrdma_netdev_search(dev));
		break;
	case NETDEV_REGISTER:
	case NETDEV_CHANGEADDR:
	case NETDEV_CHANGEUPPER:
	case NETDEV_UP:
		if (ours && !vrdma_netdev_fit(dev, ndev))
			vrdma_netdev_pair(dev, vrdma_netdev_search(dev));
		else if (vrdma_netdev_fit(dev, ndev) > vrdma_netdev_fit(dev, dev->netdev))
			vrdma_netdev_pair(dev, ndev);
		else if (ours)
			schedule_work(&dev->port_work);
		break;
	case NETDEV_DOWN:
	case NETDEV_CHANGE:
		if (ours)
			schedule_work(&dev->port_work);
		break;
	}
	return NOTIFY_DONE;
}

struct net_device *vrdma_get_netdev(struct ib_device *ibdev, u32 port)
{
	struct vrdma_dev *dev = to_vdev(ibdev);
	struct net_device *ndev;

	spin_lock(&dev->netdev_lock);
	ndev = dev->netdev;
	dev_hold(ndev);
	spin_unlock(&dev->netdev_lock);
	return ndev;
}

enum ib_port_state vrdma_port_state(struct vrdma_dev *dev, bool *enabled)
{
	struct net_device *ndev = vrdma_get_netdev(&dev->ibdev, VRDMA_PORT);
	enum ib_port_state state = IB_PORT_DOWN;

	*enabled = ndev && netif_running(ndev);
	if (*enabled && netif_carrier_ok(ndev) && READ_ONCE(dev->link_up))
		state = IB_PORT_ACTIVE;
	dev_put(ndev);
	return state;
}

static void vrdma_read_status(struct vrdma_dev *dev)
{
	u16 status;

	virtio_cread_le(dev->vdev, struct virtio_rdma_config, status, &status);
	WRITE_ONCE(dev->link_up, status & VIRTIO_RDMA_CONFIG_LINK_UP);
}

static void vrdma_port_work(struct work_struct *work)
{
	struct vrdma_dev *dev = container_of(work, struct vrdma_dev, port_work);
	struct ib_event event = {
		.device = &dev->ibdev,
		.element.port_num = VRDMA_PORT,
	};
	enum ib_port_state state;
	bool enabled;

	if (test_and_clear_bit(VRDMA_PORT_CONFIG, &dev->port_flags))
		vrdma_read_status(dev);
	if (!ib_device_try_get(&dev->ibdev)) {
		vrdma_netdev_forget(dev, false);
		return;
	}
	/* A scan only adds */
	vrdma_netdev_forget(dev, true);
	if (test_and_clear_bit(VRDMA_PORT_RESCAN, &dev->port_flags))
		rdma_roce_rescan_device(&dev->ibdev);
	state = vrdma_port_state(dev, &enabled);
	if (state != dev->port_state) {
		dev->port_state = state;
		event.event = state == IB_PORT_ACTIVE ? IB_EVENT_PORT_ACTIVE : IB_EVENT_PORT_ERR;
		ib_dispatch_event(&event);
	}
	ib_device_put(&dev->ibdev);
}

void vrdma_port_changed(struct vrdma_dev *dev, unsigned int flag)
{
	set_bit(flag, &dev->port_flags);
	schedule_work(&dev->port_work);
}

/* The notifier is told about the interfaces that are there already */
int vrdma_netdev_init(struct vrdma_dev *dev)
{
	dev->port_state = IB_PORT_DOWN;
	INIT_WORK(&dev->port_work, vrdma_port_work);
	vrdma_read_status(dev);
	dev->netdev_nb.notifier_call = vrdma_netdev_event;
	return register_netdevice_notifier(&dev->netdev_nb);
}

void vrdma_netdev_exit(struct vrdma_dev *dev)
{
	unregister_netdevice_notifier(&dev->netdev_nb);
	vrdma_netdev_forget(dev, false);
}
