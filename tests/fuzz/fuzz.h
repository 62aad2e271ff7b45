/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * fuzz.h: what the targets share: an input that is read piece by piece, and sums
 * in a plain way, apart from csum.c.
 */
#ifndef PYSPLICE_FUZZ_H
#define PYSPLICE_FUZZ_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../cext/frame.h"

#define CHECK(condition)                                                       \
	do {                                                                   \
		if (!(condition)) {                                            \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__,     \
				#condition);                                   \
			abort();                                               \
		}                                                              \
	} while (0)

struct input {
	const uint8_t *data;
	size_t len;
};

/* The next number of N bytes; 0 at the end of the input. */
static inline uint32_t take(struct input *in, size_t n)
{
	uint32_t value = 0;

	while (n-- && in->len) {
		value = value << 8 | *in->data++;
		in->len--;
	}
	return value;
}

/* The sum of 16-bit words in network order, folded (RFC 1071). */
static inline uint16_t plain_sum(const uint8_t *data, size_t len, uint32_t sum)
{
	for (size_t i = 0; i < len; i++) {
		sum += i % 2 ? data[i] : (uint32_t)data[i] << 8;
		sum = (sum & 0xffff) + (sum >> 16);
	}
	return (uint16_t)sum;
}

/* Of a whole IP packet without options and extension headers: the sum over the
 * pseudo header and all behind the IP header; 0xffff if it is valid. */
static inline uint16_t layer4_sum(const uint8_t *ip, size_t len, int ipv4)
{
	size_t header = ipv4 ? 20 : 40, addresses = ipv4 ? 8 : 32;
	uint32_t sum = (uint32_t)(len - header) + ip[ipv4 ? 9 : 6];

	sum = plain_sum(ip + (ipv4 ? 12 : 8), addresses, sum);
	return plain_sum(ip + header, len - header, sum);
}

/* A template between two hosts: IPv4 or IPv6, TCP or UDP, ports of PORTS. */
static inline size_t make_template(uint8_t *out, int ipv4, uint8_t protocol,
				   uint32_t ports)
{
	static const uint8_t v4[8] = { 10, 0, 2, 15, 192, 0, 2, 7 };
	size_t len = ipv4 ? TEMPLATE4_LEN : TEMPLATE6_LEN;
	uint8_t *ip = out + ETH_LEN;

	memset(out, 0, len);
	out[12] = ipv4 ? 0x08 : 0x86;
	out[13] = ipv4 ? 0x00 : 0xdd;
	ip[0] = ipv4 ? 0x45 : 0x60;
	ip[ipv4 ? 8 : 7] = 64;
	ip[ipv4 ? 9 : 6] = protocol;
	if (ipv4) {
		memcpy(ip + 12, v4, sizeof(v4));
	} else {
		ip[8] = ip[24] = 0xfd;
		ip[23] = 1;
		ip[39] = 2;
	}
	for (int i = 0; i < 4; i++)
		out[len - 1 - (size_t)i] = (uint8_t)(ports >> 8 * i);
	return len;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#endif
