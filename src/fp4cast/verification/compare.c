// Compares ranges of two files, a step that stays in the cache at a time. Plain C; compiled.py loads it, checks it, and
// does without where it is missing. It never judges: whatever is not plainly equal, the caller reads again and decodes.
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

enum { BLOCK = 16 };           // bytes of the codes of an MXFP4 block
enum { NO_MAGNITUDE = 0x88 };  // the bits of two codes that are their signs

struct place {
  int64_t file, at;  // its descriptor, the first byte there
};

static int read_from(const struct place *place, uint8_t *to, size_t size, size_t done) {
  while (size) {
    ssize_t got = pread(place->file, to, size, place->at + done);
    if (got <= 0) return 0;
    to += got, size -= got, done += got;
  }
  return 1;
}

static int holds_a_value(const uint8_t *codes, size_t size) {
  uint8_t seen = 0;
  for (size_t i = 0; i < size; i++) seen |= codes[i];
  return (seen & (uint8_t)~NO_MAGNITUDE) != 0;
}

// How many bytes of two ranges are equal, in whole steps: `size`, or where the step begins that is not, or not readable.
int64_t fp4cast_same_bytes(const struct place *a, const struct place *b, size_t size, uint8_t *room, size_t step) {
  for (size_t done = 0; done < size; done += step) {
    size_t n = size - done < step ? size - done : step;
    if (!read_from(a, room, n, done) || !read_from(b, room + step, n, done)) return done;
    if (memcmp(room, room + step, n)) return done;
  }
  return size;
}

// How many MXFP4 blocks have the codes of the source and the expected pair of block scales, in whole steps, as above.
// expected: by exponent byte, both scales, or more than 16 bits where no scale is plain. room: 35 bytes a block of a step.
// values: set to 1 once a code of the source is no zero.
int64_t fp4cast_same_blocks(const struct place *codes, const struct place *exponents, const struct place *new_codes,
                            const struct place *scales, size_t blocks, const uint32_t *expected, uint8_t *room,
                            size_t step, int *values) {
  uint8_t *left = room, *right = left + step * BLOCK, *pairs = right + step * BLOCK, *bytes = pairs + step * 2;
  for (size_t done = 0; done < blocks; done += step) {
    size_t n = blocks - done < step ? blocks - done : step;
    if (!read_from(exponents, bytes, n, done) || !read_from(scales, pairs, 2 * n, 2 * done)) return done;
    if (!read_from(codes, left, n * BLOCK, done * BLOCK)) return done;
    if (!read_from(new_codes, right, n * BLOCK, done * BLOCK)) return done;
    uint32_t differs = 0;
    for (size_t i = 0; i < n; i++) {
      uint16_t pair;
      memcpy(&pair, pairs + 2 * i, 2);
      differs |= pair ^ expected[bytes[i]];
    }
    if (differs || memcmp(left, right, n * BLOCK)) return done;
    if (!*values) *values = holds_a_value(left, n * BLOCK);
  }
  return blocks;
}

typedef int is_transpose(const uint8_t *, size_t rows, size_t columns, size_t, const uint8_t *, size_t);

// Rows of a matrix of records, which lie `stride` records apart.
static int read_rows(const struct place *place, uint8_t *to, size_t row, size_t rows, size_t width, size_t stride,
                     size_t record) {
  if (width == stride) return read_from(place, to, rows * width * record, row * width * record);
  for (size_t i = 0; i < rows; i++)
    if (!read_from(place, to + i * width * record, width * record, (row + i) * stride * record)) return 0;
  return 1;
}

// How many rows of `width` blocks, of `stride` in the file, are columns of the new codes and scales, in whole steps.
// turned: transpose.c's fp4cast_is_transpose. room: 19 bytes a block of a step. The rest is as above.
int64_t fp4cast_same_turned(const struct place *codes, const struct place *exponents, size_t rows, size_t width,
                            size_t stride, const uint8_t *new_codes, const uint8_t *scales, size_t columns,
                            const uint32_t *expected, uint8_t *room, size_t step, is_transpose *turned, int *values) {
  uint8_t *left = room, *pairs = left + step * width * BLOCK, *bytes = pairs + step * width * 2;
  for (size_t done = 0; done < rows; done += step) {
    size_t n = rows - done < step ? rows - done : step;
    if (!read_rows(exponents, bytes, done, n, width, stride, 1)) return done;
    uint32_t odd = 0;
    for (size_t i = 0; i < n * width; i++) {
      uint32_t pair = expected[bytes[i]];
      odd |= pair >> 16;
      memcpy(pairs + 2 * i, &(uint16_t){pair}, 2);
    }
    if (odd || !turned(pairs, n, 2 * width, 2 * width, scales + done, columns)) return done;
    if (!read_rows(codes, left, done, n, width, stride, BLOCK)) return done;
    if (!turned(left, n, BLOCK * width, BLOCK * width, new_codes + done, columns)) return done;
    if (!*values) *values = holds_a_value(left, n * width * BLOCK);
  }
  return rows;
}
