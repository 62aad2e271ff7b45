/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * runs.c: the segments of a batch are grouped into runs (cext/runs.c).  Whatever
 * is grouped, a receiver that gets run by run gets what it would have got one by
 * one.  Input: eight bytes for each segment.
 */
#include "../../cext/tap.h"

#include "fuzz.h"

static struct tap tap;
static struct segment sent[BATCH_FRAMES];

static void check_run(int index, int *seen)
{
	const struct run *run = &tap.runs[index];
	uint32_t len = 0, frames = 0, repeated = 0;
	int last = -1;

	for (int i = run->head; i >= 0; i = tap.frames[i].next) {
		const struct segment *seg = &sent[i];

		CHECK(i > last);        /* in the order in which they came */
		CHECK(!seen[i]++);      /* in one run */
		CHECK(!memcmp(seg->key, run->first.key, seg->key_len));
		CHECK(seg->udp == run->first.udp);
		CHECK(tap.frames[i].len == seg->len);
		if (!seg->udp) {
			CHECK(seg->seq == run->first.seq + len);
			/* Only the last segment of a run ends something */
			CHECK(tap.frames[i].next < 0 ||
			      !(seg->flags & (TCP_SYN | TCP_FIN | TCP_RST)));
			/* Data and bare acknowledgements do not mix, but for a
			 * FIN behind data */
			CHECK(i == run->head || !run->len == !seg->len ||
			      seg->flags & TCP_FIN);
			repeated = last >= 0 && sent[last].ack == seg->ack ?
					   repeated + 1 :
					   1;
		}
		len += seg->len;
		frames++;
		last = i;
	}
	CHECK(last == run->tail);
	CHECK(len == run->len);
	CHECK(run->frames == (run->first.udp || run->len ? frames : repeated));
	if (!run->first.udp) {
		CHECK(run->ack == sent[last].ack);
		CHECK(run->window == sent[last].window);
		CHECK(run->last_seq == sent[last].seq);
	}
}

static void check_pieces(const struct run *run, uint32_t skip, uint32_t len)
{
	struct iovec iov[BATCH_FRAMES];
	size_t total = 0;
	int count;

	skip %= run->len + 1;
	len %= run->len - skip + 1;
	count = tap_run_pieces(&tap, run, skip, len, iov);
	CHECK(count <= BATCH_FRAMES);
	for (int i = 0; i < count; i++)
		total += iov[i].iov_len;
	CHECK(total == len);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static uint8_t memory[1];
	struct input in = { data, size };
	int seen[BATCH_FRAMES] = { 0 }, frames = 0;

	tap.frame_count = tap.run_count = 0;
	tap.memory = memory;
	while (in.len >= 8 && tap.frame_count < BATCH_FRAMES) {
		struct segment *seg = &sent[tap.frame_count];
		uint8_t choices = (uint8_t)take(&in, 1);

		memset(seg, 0, sizeof(*seg));
		seg->key_len = choices & 1 ? KEY4_LEN : KEY6_LEN;
		seg->key[0] = choices >> 1 & 3;
		seg->udp = choices >> 3 & 1;
		seg->ttl = choices >> 4 & 1;
		seg->df = choices >> 5 & 1;
		seg->flags = (uint8_t)take(&in, 1) & 0x1f;
		seg->seq = take(&in, 1) - 16;
		seg->ack = take(&in, 1);
		seg->window = (uint16_t)(take(&in, 1) & 3);
		seg->len = take(&in, 1) & 15;
		seg->wscale = -1;
		take(&in, 2);
		tap_add_segment(&tap, seg, 0, 0);
	}
	CHECK(tap.run_count <= tap.frame_count);
	for (int i = 0; i < tap.run_count; i++) {
		check_run(i, seen);
		check_pieces(&tap.runs[i], take(&in, 2), take(&in, 2));
	}
	for (int i = 0; i < tap.frame_count; i++)
		frames += seen[i];
	CHECK(frames == tap.frame_count);
	return 0;
}
