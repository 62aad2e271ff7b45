/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * build.c: a frame to the guest is put together (frame_build.c); what was built is
 * checked by frame_parse(), and its sums in a plain way.
 * Input: choices, then the fields, then the payload.
 */
#include "fuzz.h"

#include "../../cext/csum.h"

static uint8_t out[VNET_HDR_LEN + FRAME_MAX];

/* Complete the checksum as a receiver of a virtio header does (5.1.6.4). */
static void complete(uint8_t *frame, size_t len, const uint8_t *header)
{
	struct vnet_header vnet;
	size_t at;
	uint16_t sum;

	memcpy(&vnet, header, sizeof(vnet));
	CHECK(vnet.flags == VNET_F_NEEDS_CSUM);
	at = (size_t)vnet.csum_start + vnet.csum_offset;
	CHECK(at + 2 <= len);
	sum = (uint16_t)~plain_sum(frame + vnet.csum_start,
				   len - vnet.csum_start, 0);
	if (!sum && vnet.csum_offset == 6)
		sum = 0xffff;
	frame[at] = (uint8_t)(sum >> 8);
	frame[at + 1] = (uint8_t)sum;
}

static void segment(struct input *in, int ipv4, int offload)
{
	uint8_t template[TEMPLATE6_LEN], options[TCP_OPTIONS_MAX] = { 0 };
	uint32_t ports = take(in, 4) | 0x00010001;
	size_t template_len = make_template(template, ipv4, PROTO_TCP, ports);
	struct tcp_fields tcp = {
		.seq = take(in, 4),
		.ack = take(in, 4),
		.window = (uint16_t)take(in, 2),
		.flags = (uint8_t)take(in, 1) & 0x1f,
		.options = options,
		.options_len = take(in, 1) % 11 * 4,
	};
	uint16_t mss = (uint16_t)(take(in, 2) | 1);
	size_t vnet_len = offload ? VNET_HDR_LEN : 0, headers;
	const uint8_t *payload;
	struct segment seg;
	uint64_t sum;

	for (size_t i = 0; i < tcp.options_len; i++)
		options[i] = (uint8_t)take(in, 1);
	payload = in->data;
	sum = csum_add(payload, in->len, 0);
	CHECK(csum_fold(sum) == 0 || in->len);
	headers = frame_build(out, template, template_len, &tcp, in->len, sum, mss,
			      offload);
	CHECK(headers == vnet_len + frame_headers_len(template_len,
						      tcp.options_len));
	memcpy(out + headers, payload, in->len);
	uint8_t *frame = out + vnet_len;
	size_t len = headers - vnet_len + in->len;

	if (offload)
		complete(frame, len, out);
	CHECK(layer4_sum(frame + ETH_LEN, len - ETH_LEN, ipv4) == 0xffff);
	if (ipv4)
		CHECK(plain_sum(frame + ETH_LEN, 20, 0) == 0xffff);
	if (tcp.flags & TCP_SYN && tcp.flags & (TCP_FIN | TCP_RST))
		return;
	CHECK(frame_parse(frame, len, 0, NULL, &seg) == FRAME_TCP);
	CHECK(seg.seq == tcp.seq && seg.ack == tcp.ack);
	CHECK(seg.window == tcp.window && seg.flags == tcp.flags);
	CHECK(seg.len == in->len && seg.payload == headers - vnet_len);
}

static void datagram(struct input *in, int ipv4, int offload)
{
	uint8_t template[TEMPLATE6_LEN];
	uint32_t ports = take(in, 4) | 0x00010001;
	size_t template_len = make_template(template, ipv4, PROTO_UDP, ports);
	size_t vnet_len = offload ? VNET_HDR_LEN : 0, headers, len;
	uint8_t *frame = out + vnet_len;
	struct segment seg;

	headers = frame_build_udp(out, template, template_len, in->len,
				  csum_add(in->data, in->len, 0), 0, offload);
	memcpy(out + headers, in->data, in->len);
	len = headers - vnet_len + in->len;
	if (offload)
		complete(frame, len, out);
	CHECK(layer4_sum(frame + ETH_LEN, len - ETH_LEN, ipv4) == 0xffff);
	CHECK(frame_parse(frame, len, 0, NULL, &seg) == FRAME_UDP);
	CHECK(seg.len == in->len && seg.payload == headers - vnet_len);
}

/* A sum in pieces is the sum of the whole, wherever the pieces begin. */
static void pieces(struct input *in)
{
	size_t cut = take(in, 2) % (in->len + 1);
	uint64_t second = csum_add(in->data + cut, in->len - cut, 0);
	uint64_t sum = csum_add(in->data, cut, 0);
	uint16_t whole = csum_fold(csum_add(in->data, in->len, 0));

	sum += cut % 2 ? csum_swap(second) : second;
	CHECK(csum_fold(sum) == whole ||
	      (csum_fold(sum) % 0xffff == 0 && whole % 0xffff == 0));
	be16 field = put_check(whole);
	CHECK(get16(field) % 0xffff ==
	      plain_sum(in->data, in->len, 0) % 0xffff);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = { data, size };
	uint8_t choices = (uint8_t)take(&in, 1);

	if (in.len > 60000)
		return -1;
	if (choices % 3 == 0)
		segment(&in, choices >> 2 & 1, choices >> 3 & 1);
	else if (choices % 3 == 1)
		datagram(&in, choices >> 2 & 1, choices >> 3 & 1);
	else
		pieces(&in);
	return 0;
}
