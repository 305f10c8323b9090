/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/*
 * The Freeflow virtio RDMA device, as the driver sees it.
 *
 * The twin of the Rust crate in this folder's parent; its tests/c_header.rs proves
 * that the two agree field by field. docs/device.md says what everything means.
 * All fields are little-endian. Reserved fields are zero. Comments name constants
 * without their VIRTIO_RDMA_.
 */
#ifndef VIRTIO_RDMA_ABI_H
#define VIRTIO_RDMA_ABI_H

#include <linux/types.h>

#define VIRTIO_RDMA_ID			42	/* reserved by the virtio specification */
#define VIRTIO_RDMA_ID_ALT		38	/* for VMMs that have no name for 42 */
#define VIRTIO_RDMA_MAGIC		0x41445246	/* "FRDA" */
#define VIRTIO_RDMA_ABI_VERSION		6
#define VIRTIO_RDMA_PAGE_SIZE		4096
#define VIRTIO_RDMA_F_ON_DEMAND		0	/* number of a feature bit */
#define VIRTIO_RDMA_CONFIG_LINK_UP	1	/* bit of virtio_rdma_config.status */

#define VIRTIO_RDMA_MAX_REQUEST		65536	/* bytes of a control request */
#define VIRTIO_RDMA_MAX_RESPONSE	4096	/* bytes of a control response */

enum {
	VIRTIO_RDMA_CMD_RESET = 0x0001,
	VIRTIO_RDMA_CMD_QUERY_DEVICE = 0x0002,
	VIRTIO_RDMA_CMD_SET_AREA = 0x0003,
	VIRTIO_RDMA_CMD_ADD_GID = 0x0004,
	VIRTIO_RDMA_CMD_DEL_GID = 0x0005,
	VIRTIO_RDMA_CMD_ALLOC_PD = 0x0101,
	VIRTIO_RDMA_CMD_DEALLOC_PD = 0x0102,
	VIRTIO_RDMA_CMD_REG_MR = 0x0201,
	VIRTIO_RDMA_CMD_EXTEND_MR = 0x0202,
	VIRTIO_RDMA_CMD_REREG_MR = 0x0203,
	VIRTIO_RDMA_CMD_DEREG_MR = 0x0204,
	VIRTIO_RDMA_CMD_ALLOC_MR = 0x0205,
	VIRTIO_RDMA_CMD_MAP_PAGES = 0x0206,
	VIRTIO_RDMA_CMD_UNMAP_PAGES = 0x0207,
	VIRTIO_RDMA_CMD_DENY_PAGES = 0x0208,
	VIRTIO_RDMA_CMD_CREATE_CQ = 0x0301,
	VIRTIO_RDMA_CMD_DESTROY_CQ = 0x0302,
	VIRTIO_RDMA_CMD_RESIZE_CQ = 0x0303,
	VIRTIO_RDMA_CMD_CREATE_QP = 0x0401,
	VIRTIO_RDMA_CMD_MODIFY_QP = 0x0402,
	VIRTIO_RDMA_CMD_QUERY_QP = 0x0403,
	VIRTIO_RDMA_CMD_DESTROY_QP = 0x0404,
	VIRTIO_RDMA_CMD_CREATE_SRQ = 0x0501,
	VIRTIO_RDMA_CMD_MODIFY_SRQ = 0x0502,
	VIRTIO_RDMA_CMD_QUERY_SRQ = 0x0503,
	VIRTIO_RDMA_CMD_DESTROY_SRQ = 0x0504,
	VIRTIO_RDMA_CMD_RESIZE_SRQ = 0x0505,
	VIRTIO_RDMA_CMD_ALLOC_MW = 0x0601,
	VIRTIO_RDMA_CMD_DEALLOC_MW = 0x0602,
	VIRTIO_RDMA_CMD_ATTACH_MCAST = 0x0701,
	VIRTIO_RDMA_CMD_DETACH_MCAST = 0x0702,
};

enum {
	VIRTIO_RDMA_STATUS_OK = 0,
	VIRTIO_RDMA_STATUS_INVALID = 1,
	VIRTIO_RDMA_STATUS_NO_RESOURCES = 2,
	VIRTIO_RDMA_STATUS_NOT_FOUND = 3,
	VIRTIO_RDMA_STATUS_BUSY = 4,
	VIRTIO_RDMA_STATUS_UNSUPPORTED = 5,
	VIRTIO_RDMA_STATUS_NOT_PERMITTED = 6,
	VIRTIO_RDMA_STATUS_BAD_ADDRESS = 7,
	VIRTIO_RDMA_STATUS_BAD_STATE = 8,
};

enum {
	VIRTIO_RDMA_AREA_DOORBELL = 0,
	VIRTIO_RDMA_AREA_CQ_ARM = 1,
	VIRTIO_RDMA_AREA_ADDRESS_HANDLE = 2,
};

enum {
	VIRTIO_RDMA_EVENT_COMPLETION = 1,
	VIRTIO_RDMA_EVENT_CQ_ERROR = 2,
	VIRTIO_RDMA_EVENT_QP_FATAL = 16,
	VIRTIO_RDMA_EVENT_QP_REQUEST_ERROR = 17,
	VIRTIO_RDMA_EVENT_QP_ACCESS_ERROR = 18,
	VIRTIO_RDMA_EVENT_COMM_ESTABLISHED = 19,
	VIRTIO_RDMA_EVENT_SQ_DRAINED = 20,
	VIRTIO_RDMA_EVENT_LAST_WQE_REACHED = 21,
	VIRTIO_RDMA_EVENT_SRQ_ERROR = 32,
	VIRTIO_RDMA_EVENT_SRQ_LIMIT = 33,
	VIRTIO_RDMA_EVENT_PAGE_FAULT = 48,
	VIRTIO_RDMA_EVENT_DEVICE_FATAL = 64,
};

enum {
	VIRTIO_RDMA_FORMAT_RXE = 0,
};

/* First command numbers of ranges that are reserved */
#define VIRTIO_RDMA_CMDS_STREAM		0x0800

#define VIRTIO_RDMA_NO_OBJECT		0xffffffffU

/* Bits of virtio_rdma_rereg_mr.flags */
#define VIRTIO_RDMA_REREG_TRANS		1
#define VIRTIO_RDMA_REREG_PD		2
#define VIRTIO_RDMA_REREG_ACCESS	4

/* Bits of virtio_rdma_reg_mr.flags, virtio_rdma_create_qp.flags */
#define VIRTIO_RDMA_REG_DMA		1
#define VIRTIO_RDMA_REG_ON_DEMAND	2
#define VIRTIO_RDMA_QP_KERNEL		1

/* Pages of an on-demand region, those that are cut at its ends included */
#define VIRTIO_RDMA_MAX_ON_DEMAND_PAGES	0x80000000U

/* Bit of virtio_rdma_map_pages.flags, virtio_rdma_page_range.flags */
#define VIRTIO_RDMA_PAGES_WRITE		1

/* Values of virtio_rdma_alloc_mw.kind */
#define VIRTIO_RDMA_MW_TYPE_1		1
#define VIRTIO_RDMA_MW_TYPE_2		2

/* Opcodes of work requests and completions that are not part of the user ABI */
#define VIRTIO_RDMA_WR_REG_MR		0x20
#define VIRTIO_RDMA_WC_REG_MR		0x40

/* Bits of ib_uverbs_wc.wc_flags, with the numbers of libibverbs */
#define VIRTIO_RDMA_WC_GRH		1
#define VIRTIO_RDMA_WC_WITH_IMM		2
#define VIRTIO_RDMA_WC_WITH_INV		8

/* Values of ib_uverbs_wc.sl of a datagram: what the header in front of it is */
#define VIRTIO_RDMA_SL_ROCE_V2_IPV6	1
#define VIRTIO_RDMA_SL_ROCE_V2_IPV4	2

/* Doorbell area: see docs/device.md for the order of the accesses */
#define VIRTIO_RDMA_DB_SLEEPING		0	/* offset of the 32-bit word */
#define VIRTIO_RDMA_DB_SUMMARY		64	/* offset of the 64-bit summary words */

/* Values of the 32-bit arm word of a CQ, and bytes from one to the next */
#define VIRTIO_RDMA_ARM_NONE		0
#define VIRTIO_RDMA_ARM_SOLICITED	1
#define VIRTIO_RDMA_ARM_NEXT		2
#define VIRTIO_RDMA_ARM_STRIDE		4

#define VIRTIO_RDMA_AH_STRIDE		64
#define VIRTIO_RDMA_AH_VALID		1	/* bit of virtio_rdma_ah.flags */

/* The configuration space */
struct virtio_rdma_config {
	__le32 magic;	/* MAGIC; a driver refuses a device without it */
	__le16 version;	/* ABI_VERSION; a driver refuses one that it does not know */
	/* Port status, CONFIG_LINK_UP. A change would raise an interrupt; none happens yet */
	__le16 status;
	/* Number of event virtqueues, at least 1: one for each completion vector */
	__le16 num_event_queues;
	/* Number of doorbell virtqueues, at least 1: one for each data-path worker */
	__le16 num_doorbell_queues;
	__u8 mac[6];	/* MAC of the guest's ordinary interface that this device rides beside */
	__u8 max_mtu;	/* Largest MTU of the port, an enum ib_mtu (1: 256 to 5: 4096 bytes) */
	__u8 active_mtu;	/* MTU in use, an enum ib_mtu */
	__u8 node_guid[8];	/* Node GUID, big-endian as on the wire, an EUI-64 made of mac */
	__le32 speed_mbps;	/* Speed of the port in Mbit/s, for display only */
	__le64 reserved[4];
};

/* Starts every request */
struct virtio_rdma_ctrl_hdr {
	__le16 opcode;	/* A CMD_ */
	__le16 flags;
	__le32 length;	/* Bytes of the whole request, this header included */
};

/* Starts every response */
struct virtio_rdma_ctrl_resp {
	__le32 status;	/* A STATUS_ */
	/* Bytes of the whole response, this header included; just this header unless the
	 * status is OK
	 */
	__le32 length;
};

/* A piece of guest-physical memory */
struct virtio_rdma_extent {
	__le64 addr;	/* Guest-physical address of the first byte */
	__le64 len;	/* Bytes, not zero */
};

/*
 * Request that names one object and nothing else: `DEALLOC_PD`, `DEREG_MR`, `DESTROY_CQ`,
 * `QUERY_QP`, `DESTROY_QP`, `QUERY_SRQ`, `DESTROY_SRQ`, `DEALLOC_MW`
 */
struct virtio_rdma_object_req {
	__le32 number;	/* PD number, key, CQ, QP or SRQ number */
	__le32 reserved;
};

/*
 * Response that names one new object: `ALLOC_PD`, `REG_MR`, `ALLOC_MR`, `CREATE_CQ`,
 * `CREATE_SRQ`, `ALLOC_MW`
 */
struct virtio_rdma_object_resp {
	__le32 number;	/* PD number, key, CQ or SRQ number */
	__le32 reserved;
};

/* Response of `QUERY_DEVICE`: the profile of this virtual NIC, fixed while it exists */
struct virtio_rdma_device_attr {
	__le64 max_mr_size;	/* Most bytes in one memory region */
	__le32 access_flags;	/* Bits of enum ib_access_flags that regions may have */
	__le32 max_qp;	/* Most queue pairs */
	__le32 max_qp_wr;	/* Most work requests outstanding in one send or receive queue */
	__le32 max_sge;	/* Most SGEs of a send or receive work request */
	__le32 max_inline_data;	/* Most bytes of inline data */
	__le32 max_cq;	/* Most completion queues; CQ numbers are below it */
	__le32 max_cqe;	/* Most entries of a completion queue */
	__le32 max_mr;	/* Most memory regions */
	__le32 max_pd;	/* Most protection domains */
	__le32 max_ah;	/* Number of address handle records; handles are below it */
	__le32 max_doorbells;	/* Number of doorbells in each doorbell area, a multiple of 64 */
	__le32 max_gids;	/* Entries of the GID table */
	/* Most READs and atomics outstanding for a QP as initiator or responder */
	__le32 max_rd_atomic;
	__le32 qp_types;	/* Bit for each enum ib_qp_type that can be created */
	__le32 ring_formats;	/* Bit for each FORMAT_ that rings may have */
	__le32 max_srq;	/* Most shared receive queues; zero while they are not offered */
	__le32 max_mw;	/* Most memory windows; zero while they are not offered */
	__le32 max_mcast_grp;	/* Most multicast groups; zero while they are not offered */
	__le32 max_msg_size;	/* Bytes in the largest message */
	__le32 atomic_cap;	/* What atomics are atomic with, an enum ib_atomic_cap */
	/* Most extents of one fast registration; zero while it is not offered */
	__le32 max_fast_reg_extents;
	__le32 max_mcast_qp_attach;	/* Most QPs of this virtual NIC in one multicast group */
	__le32 reserved[7];
	__le32 vendor_id;	/* Vendor id for display */
};

/* `SET_AREA`: shares an area with the device, until RESET */
struct virtio_rdma_set_area {
	__le16 kind;	/* An AREA_ */
	__le16 index;	/* Which one, where there are several of a kind */
	__le32 num_extents;	/* Number of extents that follow */
};

/* `ADD_GID`: fills one entry of the GID table */
struct virtio_rdma_add_gid {
	__le16 index;	/* Entry */
	__u8 roce_version;	/* RoCE version: 1 or 2 */
	__u8 reserved[5];
	__u8 gid[16];	/* The GID: an IPv6 address, or an IPv4 address mapped into one */
};

/* `DEL_GID`: clears one entry of the GID table */
struct virtio_rdma_del_gid {
	__le16 index;	/* Entry */
	__u8 reserved[6];
};

/* `REG_MR`: registers memory */
struct virtio_rdma_reg_mr {
	__le32 pdn;	/* Protection domain */
	__le32 access;	/* Bits of enum ib_access_flags */
	/* Address that work requests use for the first byte; 0 for zero-based regions */
	__le64 iova;
	__le64 length;	/* Bytes */
	__le32 num_extents;	/* Number of extents that follow */
	/* REG_DMA: iova, length and num_extents are zero with it; REG_ON_DEMAND: num_extents is */
	__le32 flags;
};

/* `MAP_PAGES`: gives an on-demand region pages */
struct virtio_rdma_map_pages {
	__le32 key;	/* Key of the region */
	__le32 flags;	/* PAGES_WRITE, without which the pages may only be read */
	__le32 first;	/* First page; page 0 is that of the region's first byte */
	__le32 num_extents;	/* Number of extents of whole pages that follow */
};

/* `UNMAP_PAGES`, `DENY_PAGES`: pages of an on-demand region */
struct virtio_rdma_page_range {
	__le32 key;	/* Key of the region */
	__le32 flags;	/* With DENY_PAGES: PAGES_WRITE, with which they can be had to be read */
	__le32 first;	/* First page */
	__le32 count;	/* Number of pages, not zero */
};

/* `ALLOC_MR`: a region that `REG_MR` work requests give memory to */
struct virtio_rdma_alloc_mr {
	__le32 pdn;	/* Protection domain */
	__le32 max_extents;	/* Most extents that it will have at a time */
};

/* The part of a `REG_MR` work request that stands in rxe_send_wr.wr; kernel QPs only */
struct virtio_rdma_reg_wr {
	__le64 extents;	/* Guest-physical address of an array of virtio_rdma_extent */
	__le64 iova;	/* Address that work requests use for the first byte */
	__le64 length;	/* Bytes */
	__le32 key;	/* New key: that of the region but for the low byte */
	__le32 access;	/* Bits of enum ib_access_flags */
	__le32 num_extents;	/* Number of extents */
	__le32 reserved;
};

/* `ALLOC_MW`: a memory window */
struct virtio_rdma_alloc_mw {
	__le32 pdn;	/* Protection domain */
	__u8 kind;	/* MW_TYPE_1 or MW_TYPE_2 */
	__u8 reserved[3];
};

/* `EXTEND_MR`: further extents of a region that is not complete */
struct virtio_rdma_extend_mr {
	__le32 key;	/* Key of the region */
	__le32 num_extents;	/* Number of extents that follow */
};

/* `REREG_MR`: changes a region in place; the key stays */
struct virtio_rdma_rereg_mr {
	__le32 key;	/* Key of the region */
	__le32 flags;	/* Which of the following to replace */
	__le32 pdn;	/* Protection domain */
	__le32 access;	/* Bits of enum ib_access_flags */
	__le64 iova;	/* Address of the first byte */
	__le64 length;	/* Bytes */
	__le32 num_extents;	/* Number of extents that follow */
	__le32 reserved;
};

/* One ring in guest memory: struct rxe_queue_buf, then its elements */
struct virtio_rdma_ring_desc {
	__u8 format;	/* A FORMAT_ */
	__u8 reserved[3];
	/* Number of elements, a power of two; one of them always stays empty. Zero: no ring */
	__le32 entries;
	__le32 stride;	/* Bytes from one element to the next, a power of two */
	__le32 num_extents;	/* Number of page-aligned extents that describe it */
};

/* `CREATE_CQ` */
struct virtio_rdma_create_cq {
	__le16 vector;	/* Completion vector: the event queue that its events go to */
	__u8 reserved[6];
	struct virtio_rdma_ring_desc ring;	/* The ring */
};

/* `RESIZE_CQ`: another ring in place of the present one */
struct virtio_rdma_resize_cq {
	__le32 cqn;	/* CQ number */
	__le32 reserved;
	struct virtio_rdma_ring_desc ring;	/* The new ring */
};

/* `CREATE_QP` */
struct virtio_rdma_create_qp {
	__le32 pdn;	/* Protection domain */
	__u8 qp_type;	/* An enum ib_qp_type */
	__u8 sq_sig_all;	/* 1: every send work request makes a completion */
	__le16 flags;	/* QP_KERNEL: only the kernel writes the rings */
	__le32 send_cqn;	/* CQ of the send queue */
	__le32 recv_cqn;	/* CQ of the receive queue */
	__le32 srqn;	/* Shared receive queue; NO_OBJECT for none */
	__le16 max_send_sge;	/* Most SGEs of a send work request */
	__le16 max_recv_sge;	/* Most SGEs of a receive work request */
	__le32 max_inline_data;	/* Most bytes of inline data */
	__le32 reserved[3];
	struct virtio_rdma_ring_desc sq;	/* The send ring */
	struct virtio_rdma_ring_desc rq;	/* The receive ring; no entries with an SRQ */
};

/* Response of `CREATE_QP` */
struct virtio_rdma_create_qp_resp {
	__le32 qpn;	/* QP number, 24 bits, unpredictable */
	/* Doorbell queue (counted from 0) and area of the worker that owns the QP */
	__le16 doorbell_queue;
	__le16 reserved0;
	__le32 doorbell;	/* The QP's bit in that doorbell area */
	__le32 reserved1;
};

/* Where a connected QP or a GRH goes (IBA 11.2.4.2, address vector) */
struct virtio_rdma_av {
	__u8 dgid[16];	/* Destination GID */
	__le32 flow_label;	/* Flow label of the GRH */
	__le16 sgid_index;	/* Index of the source GID */
	__u8 hop_limit;	/* Hop limit of the GRH */
	__u8 traffic_class;	/* Traffic class of the GRH */
	__u8 sl;	/* Service level */
	__u8 reserved[7];
};

/* Attributes of a QP, with the meaning and units of `struct ib_qp_attr` */
struct virtio_rdma_qp_attr {
	__u8 qp_state;	/* An enum ib_qp_state */
	__u8 cur_qp_state;	/* The state the caller believes the QP to be in */
	__u8 path_mtu;	/* An enum ib_mtu */
	__u8 sq_draining;	/* 1 while the send queue drains */
	__le32 qkey;	/* Q_Key of a UD QP */
	__le32 rq_psn;	/* PSN expected first by the receive queue, 24 bits */
	__le32 sq_psn;	/* PSN of the send queue's first packet, 24 bits */
	__le32 dest_qpn;	/* The peer's QP number, 24 bits */
	__le32 access_flags;	/* Remote access allowed by the QP, enum ib_access_flags */
	__le16 pkey_index;	/* P_Key table index, 0 */
	__u8 port_num;	/* Port, 1 */
	__u8 max_rd_atomic;	/* READs and atomics outstanding as initiator */
	__u8 max_dest_rd_atomic;	/* READs and atomics outstanding as responder */
	__u8 min_rnr_timer;	/* RNR NAK timer code, 0 to 31 (IBA table 45) */
	__u8 timeout;	/* Local ACK timeout: 4.096 us * 2^timeout; 0 for ever */
	__u8 retry_cnt;	/* Retries of a lost message, 0 to 7 */
	__u8 rnr_retry;	/* Retries after RNR NAK, 0 to 6; 7 for ever */
	__u8 en_sqd_async_notify;	/* 1: raise an event when drained */
	__u8 reserved[6];
	struct virtio_rdma_av av;	/* Where to */
};

/* `MODIFY_QP` (IBA 11.2.5.2) */
struct virtio_rdma_modify_qp {
	__le32 qpn;	/* QP number */
	__le32 attr_mask;	/* Bits of enum ib_qp_attr_mask: which attributes count */
	struct virtio_rdma_qp_attr attr;	/* The attributes */
};

/* CREATE_SRQ; the extents of the ring follow */
struct virtio_rdma_create_srq {
	__le32 pdn;	/* Receives are held to it, whatever that of the QP is */
	__le16 max_sge;
	__le16 reserved;
	__le32 limit;
	__le32 reserved1;
	struct virtio_rdma_ring_desc ring;
};

/* MODIFY_SRQ: an event when fewer receives than the limit are left, once; zero for none */
struct virtio_rdma_modify_srq {
	__le32 srqn;
	__le32 limit;
};

/* RESIZE_SRQ: another ring in place of the present one */
struct virtio_rdma_resize_srq {
	__le32 srqn;
	__le32 reserved;
	struct virtio_rdma_ring_desc ring;
};

struct virtio_rdma_srq_attr {
	__le32 limit;	/* Zero once its event was raised */
	__le32 reserved;
};

/* ATTACH_MCAST and DETACH_MCAST: a UD QP joins or leaves a multicast group (IBA 11.2.7) */
struct virtio_rdma_mcast {
	__le32 qpn;
	__le32 reserved;
	__u8 mgid[16];	/* A multicast IPv6 address, or an IPv4 one mapped into one */
};

/* One address handle (IBA 11.2.2.1) */
struct virtio_rdma_ah {
	__u8 flags;	/* AH_VALID; the driver writes it last, and clears it first */
	__u8 port_num;	/* Port, 1 */
	__le16 sgid_index;	/* Index of the source GID */
	__le32 pdn;	/* The protection domain that it belongs to */
	__u8 dgid[16];	/* Destination GID */
	__le32 flow_label;	/* Flow label of the GRH */
	__u8 hop_limit;	/* Hop limit of the GRH */
	__u8 traffic_class;	/* Traffic class of the GRH */
	__u8 sl;	/* Service level */
	__u8 reserved0;
	__u8 reserved1[32];
};

/* One event */
struct virtio_rdma_event {
	__le16 kind;	/* An EVENT_ */
	__le16 write;	/* Of a page fault, 1 if the pages are to be written; else zero */
	/* Number of the object: a CQ number, QP number, SRQ number, key or port, by kind */
	__le32 number;
	__le32 page;	/* Of a page fault, the first page; else zero */
	__le32 count;	/* Of a page fault, how many pages; else zero */
};

#endif
