/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * csum.h: the Internet checksum (RFC 1071), in the byte order of memory.
 */
#ifndef PYSPLICE_CSUM_H
#define PYSPLICE_CSUM_H

#include <stddef.h>
#include <stdint.h>

/* Sum of LEN bytes at DATA as 16-bit words, added to SUM.  An odd last byte
 * counts as the first byte of a word, so only the last piece of a sum made of
 * pieces may be odd: csum_swap() turns the sum of a piece that starts at an
 * odd offset.  The result is not folded. */
uint64_t csum_add(const void *data, size_t len, uint64_t sum);

/* The sum of a piece as it counts when the piece starts at an odd offset. */
uint64_t csum_swap(uint64_t sum);

/* Fold to 16 bits, not complemented: what goes into the check field of a
 * packet whose checksum the receiver completes, and 0xffff for a valid sum. */
uint16_t csum_fold(uint64_t sum);

#endif
