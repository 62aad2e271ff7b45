/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * harness.c: frame_parse.c, frame_build.c and csum.c by themselves under AddressSanitizer and UBSan.  Feeds every truncation of
 * valid frames, single changed bytes and random bytes, each in memory of exactly its size, so that one byte
 * read beyond the frame ends the program.  Usage: harness COUNT SEED
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../cext/csum.h"
#include "../../cext/frame.h"

static uint64_t state;

static uint32_t rnd(void)
{
	state = state * 6364136223846793005u + 1442695040888963407u;
	return (uint32_t)(state >> 33);
}

static const uint8_t mac[6] = { 0x9a, 0x55, 0x9a, 0x55, 0x9a, 0x55 };
static unsigned long counts[4];

static void feed(const uint8_t *data, size_t len)
{
	uint8_t *frame = malloc(len ? len : 1);
	struct segment seg;

	if (len)
		memcpy(frame, data, len);
	for (int trusted = 0; trusted < 2; trusted++) {
		enum frame_kind kind = frame_parse(frame, len, trusted,
						   len % 2 ? mac : NULL, &seg);

		counts[kind]++;
		if ((kind == FRAME_TCP || kind == FRAME_UDP) &&
		    ((size_t)seg.payload + seg.len > len ||
		     (seg.key_len != KEY4_LEN && seg.key_len != KEY6_LEN)))
			abort();
	}
	free(frame);
}

/* The same for frame_build_udp(). */
static size_t valid_udp(uint8_t *out, int ipv4, size_t payload)
{
	uint8_t template[TEMPLATE6_LEN] = {0}, headers[HEADERS_MAX], body[256];
	size_t template_len = ipv4 ? TEMPLATE4_LEN : TEMPLATE6_LEN, n;
	uint8_t *ip = template + ETH_LEN;

	template[12] = ipv4 ? 0x08 : 0x86;
	template[13] = ipv4 ? 0x00 : 0xdd;
	ip[0] = ipv4 ? 0x45 : 0x60;
	ip[ipv4 ? 8 : 7] = 64;
	ip[ipv4 ? 9 : 6] = 17;
	if (ipv4) {
		memcpy(ip + 12, "\x0a\x00\x02\x0f\xc0\x00\x02\x07", 8);
	} else {
		ip[8] = ip[24] = 0xfd;
		ip[23] = 1;
		ip[39] = 2;
	}
	memcpy(template + template_len - 4, "\x9c\x40\x00\x50", 4);
	for (size_t i = 0; i < payload; i++)
		body[i] = (uint8_t)rnd();
	n = frame_build_udp(headers, template, template_len, payload,
			    csum_add(body, payload, 0), 0, 0);
	memcpy(out, headers, n);
	memcpy(out + n, body, payload);
	return n + payload;
}

/* A frame that frame_build() made, which frame_parse() has to accept. */
static size_t valid(uint8_t *out, int ipv4, uint8_t flags, size_t payload)
{
	static const uint8_t options[] = {2, 4, 5, 180, 1, 3, 3, 7};
	uint8_t template[TEMPLATE6_LEN] = {0}, headers[HEADERS_MAX];
	size_t template_len = ipv4 ? TEMPLATE4_LEN : TEMPLATE6_LEN, n;
	struct tcp_fields tcp = {
		.seq = rnd(),
		.ack = rnd(),
		.window = (uint16_t)rnd(),
		.flags = flags,
		.options = options,
		.options_len = flags & TCP_SYN ? sizeof(options) : 0,
	};
	uint8_t *ip = template + ETH_LEN;

	template[12] = ipv4 ? 0x08 : 0x86;
	template[13] = ipv4 ? 0x00 : 0xdd;
	if (ipv4) {
		ip[0] = 0x45;
		ip[8] = 64;
		ip[9] = 6;
		memcpy(ip + 12, "\x0a\x00\x02\x0f\xc0\x00\x02\x07", 8);
	} else {
		ip[0] = 0x60;
		ip[6] = 6;
		ip[7] = 64;
		ip[8] = ip[24] = 0xfd;
		ip[23] = 1;
		ip[39] = 2;
	}
	memcpy(template + template_len - 4, "\x9c\x40\x00\x50", 4);

	uint8_t body[256];
	for (size_t i = 0; i < payload; i++)
		body[i] = (uint8_t)rnd();
	n = frame_build(headers, template, template_len, &tcp, payload,
			csum_add(body, payload, 0), 1460, 0);
	memcpy(out, headers, n);
	memcpy(out + n, body, payload);
	return n + payload;
}

int main(int argc, char **argv)
{
	unsigned long count = argc > 1 ? strtoul(argv[1], NULL, 10) : 100000;
	uint8_t frame[1024];

	state = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;

	for (int ipv4 = 0; ipv4 < 2; ipv4++) {
		for (int kind = 0; kind < 5; kind++) {
			uint8_t flags = kind ? TCP_ACK : TCP_SYN;
			size_t payload = kind == 2 || kind == 4 ? 101 : 0;
			size_t len = kind < 3 ?
					     valid(frame, ipv4, flags, payload) :
					     valid_udp(frame, ipv4, payload);
			struct segment seg;

			if (frame_parse(frame, len, 0, NULL, &seg) !=
			    (kind < 3 ? FRAME_TCP : FRAME_UDP))
				return 2;
			if (kind >= 3 && seg.len != payload)
				return 3;
			for (size_t i = 0; i < len; i++) {
				uint8_t was = frame[i];

				feed(frame, i);
				for (int bit = 0; bit < 8; bit++) {
					frame[i] = (uint8_t)(was ^ 1 << bit);
					feed(frame, len);
				}
				frame[i] = was;
			}
		}
	}

	for (unsigned long i = 0; i < count; i++) {
		uint8_t flags = rnd() & 1 ? TCP_SYN : TCP_ACK;
		size_t payload = rnd() % 200;
		int ipv4 = (int)(rnd() & 1);
		size_t len = rnd() % 3 ? valid(frame, ipv4, flags, payload) :
					 valid_udp(frame, ipv4, payload);

		/* From a few changed bytes to nothing but noise */
		for (uint32_t n = rnd() % 8 ? rnd() % 4 : 1000; n; n--)
			frame[rnd() % len] = (uint8_t)rnd();
		feed(frame, rnd() % 4 ? len : rnd() % (len + 1));
	}
	printf("%lu bad, %lu TCP, %lu UDP, %lu other\n", counts[0], counts[1],
	       counts[2], counts[3]);
	return 0;
}
