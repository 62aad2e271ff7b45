/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * csum.c: the Internet checksum.  Owns nothing; compiles without Python.h.
 *
 * RFC 1071, section 2: the sum does not depend on the width in which the words
 * are added, as long as all carries are folded back, or on the byte order.  So
 * whole 32-bit words go into 64-bit accumulators, which cannot overflow below
 * 16 GiB, in a loop that the compiler turns into vector instructions.
 */
#include "csum.h"

#include <string.h>

uint64_t csum_add(const void *data, size_t len, uint64_t sum)
{
	const uint8_t *p = data;
	uint64_t lane[8] = {0};

	for (; len >= 32; len -= 32, p += 32) {
		uint32_t word[8];

		memcpy(word, p, sizeof(word));
		for (int i = 0; i < 8; i++)
			lane[i] += word[i];
	}
	for (int i = 0; i < 8; i++)
		sum += (lane[i] & 0xffffffff) + (lane[i] >> 32);

	for (; len >= 2; len -= 2, p += 2) {
		uint16_t word;

		memcpy(&word, p, sizeof(word));
		sum += word;
	}
	if (len) {
		uint16_t word = 0;

		memcpy(&word, p, 1);
		sum += word;
	}
	return sum;
}

uint64_t csum_swap(uint64_t sum)
{
	uint16_t folded = csum_fold(sum);

	return (uint16_t)(folded << 8 | folded >> 8);
}

uint16_t csum_fold(uint64_t sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)sum;
}
