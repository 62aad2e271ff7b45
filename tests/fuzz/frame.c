/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * frame.c: a frame from the guest is taken apart (frame_parse.c).
 * Input: one byte of choices, then the frame.
 */
#include "fuzz.h"

#include "../../cext/csum.h"

static const uint8_t station[6] = { 0x9a, 0x55, 0x9a, 0x55, 0x9a, 0x55 };

/* Make the checksums right where the frame is of the plain kind, so that what is
 * behind them is reached. */
static void mend(uint8_t *frame, size_t len)
{
	uint8_t *ip = frame + ETH_LEN;
	size_t header, total, at;
	int ipv4;

	if (len < ETH_LEN + 40)
		return;
	ipv4 = frame[12] == 0x08;
	header = ipv4 ? (size_t)(ip[0] & 15) * 4 : 40;
	total = ipv4 ? (size_t)(ip[2] << 8 | ip[3]) :
		       40 + (size_t)(ip[4] << 8 | ip[5]);
	if (total > len - ETH_LEN || header < 20 || header + 20 > total)
		return;
	if (ipv4) {
		uint16_t sum;

		ip[10] = ip[11] = 0;
		sum = (uint16_t)~plain_sum(ip, header, 0);
		ip[10] = (uint8_t)(sum >> 8);
		ip[11] = (uint8_t)sum;
	}
	at = header + (ip[ipv4 ? 9 : 6] == PROTO_TCP ? 16 : 6);
	ip[at] = ip[at + 1] = 0;
	uint32_t sum = (uint32_t)(total - header) + ip[ipv4 ? 9 : 6];
	sum = plain_sum(ip + (ipv4 ? 12 : 8), ipv4 ? 8 : 32, sum);
	sum = (uint16_t)~plain_sum(ip + header, total - header, sum);
	ip[at] = (uint8_t)(sum >> 8);
	ip[at + 1] = (uint8_t)sum;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct input in = { data, size };
	uint8_t choices = (uint8_t)take(&in, 1), *frame;
	struct segment seg, again;
	enum frame_kind kind;

	if (in.len > FRAME_MAX)
		return -1;
	/* Exactly its size: a byte read beyond it ends the program */
	frame = malloc(in.len ? in.len : 1);
	if (in.len)
		memcpy(frame, in.data, in.len);
	if (choices & 4)
		mend(frame, in.len);

	kind = frame_parse(frame, in.len, choices & 1,
			   choices & 2 ? station : NULL, &seg);
	if (kind == FRAME_BAD)
		CHECK(seg.reason < DROP_REASONS);
	if (kind == FRAME_TCP || kind == FRAME_UDP) {
		const uint8_t *ports = seg.key + seg.key_len - PORTS_LEN;

		CHECK(seg.key_len == KEY4_LEN || seg.key_len == KEY6_LEN);
		CHECK((size_t)seg.payload + seg.len <= in.len);
		CHECK(seg.payload >= ETH_LEN + 28);
		CHECK(ports[0] | ports[1] && ports[2] | ports[3]);
		CHECK(seg.udp == (kind == FRAME_UDP));
		/* The flow's addresses are those of the packet */
		CHECK(!memcmp(seg.key,
			      frame + ETH_LEN + (seg.key_len == KEY4_LEN ? 12 : 8),
			      (size_t)seg.key_len - PORTS_LEN));
		if (kind == FRAME_TCP && seg.flags & TCP_SYN)
			CHECK(!(seg.flags & (TCP_FIN | TCP_RST)));
		CHECK(seg.wscale >= -1 && seg.wscale <= 14);
		/* Whom the tap trusts is not refused */
		CHECK(frame_parse(frame, in.len, 1, NULL, &again) == kind);
		CHECK(!memcmp(&seg, &again, sizeof(seg)));
	}
	free(frame);
	return 0;
}
