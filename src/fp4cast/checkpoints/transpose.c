// Turns a matrix of bytes, 16 by 16 at a time in vector registers. Plain C with the vectors that GCC (12 and
// newer) and Clang have on every processor; transpose.py loads it, checks it, and does without where it is missing.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { SIDE = 16 };
typedef uint8_t Line __attribute__((vector_size(SIDE)));

// Bytes of two lines by turns: of their first halves, of their second halves.
#define FIRST(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define SECOND(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)

static inline void riffle(const Line *from, Line *to) {
  for (int i = 0; i < SIDE / 2; i++) {
    to[2 * i] = FIRST(from[i], from[i + SIDE / 2]);
    to[2 * i + 1] = SECOND(from[i], from[i + SIDE / 2]);
  }
}

// Position 16 r + c has eight bits, a riffle rotates them by one, and four of them exchange r and c.
static inline void load_turned(const uint8_t *from, size_t stride, Line *lines) {
  Line other[SIDE];
  for (int i = 0; i < SIDE; i++) memcpy(&lines[i], from + i * stride, SIDE);
  riffle(lines, other), riffle(other, lines), riffle(lines, other), riffle(other, lines);
}

static void turn_bytes(const uint8_t *from, size_t rows, size_t columns, size_t from_stride, uint8_t *to,
                       size_t to_stride) {
  for (size_t r = 0; r < rows; r++)
    for (size_t c = 0; c < columns; c++) to[c * to_stride + r] = from[r * from_stride + c];
}

static int same_bytes(const uint8_t *from, size_t rows, size_t columns, size_t from_stride, const uint8_t *to,
                      size_t to_stride) {
  for (size_t r = 0; r < rows; r++)
    for (size_t c = 0; c < columns; c++)
      if (to[c * to_stride + r] != from[r * from_stride + c]) return 0;
  return 1;
}

// to[c * to_stride + r] = from[r * from_stride + c] for all r < rows and c < columns.
void fp4cast_transpose(const uint8_t *from, size_t rows, size_t columns, size_t from_stride, uint8_t *to,
                       size_t to_stride) {
  size_t whole_rows = rows / SIDE * SIDE, whole_columns = columns / SIDE * SIDE;
  for (size_t c = 0; c < whole_columns; c += SIDE)
    for (size_t r = 0; r < whole_rows; r += SIDE) {
      Line lines[SIDE];
      load_turned(from + r * from_stride + c, from_stride, lines);
      for (int i = 0; i < SIDE; i++) memcpy(to + (c + i) * to_stride + r, &lines[i], SIDE);
    }
  turn_bytes(from + whole_rows * from_stride, rows - whole_rows, columns, from_stride, to + whole_rows, to_stride);
  turn_bytes(from + whole_columns, whole_rows, columns - whole_columns, from_stride,
             to + whole_columns * to_stride, to_stride);
}

// Whether that is what `to` holds already: 1 or 0.
int fp4cast_is_transpose(const uint8_t *from, size_t rows, size_t columns, size_t from_stride, const uint8_t *to,
                         size_t to_stride) {
  size_t whole_rows = rows / SIDE * SIDE, whole_columns = columns / SIDE * SIDE;
  for (size_t c = 0; c < whole_columns; c += SIDE) {
    Line differs = {0};
    for (size_t r = 0; r < whole_rows; r += SIDE) {
      Line lines[SIDE], there;
      load_turned(from + r * from_stride + c, from_stride, lines);
      for (int i = 0; i < SIDE; i++) {
        memcpy(&there, to + (c + i) * to_stride + r, SIDE);
        differs |= lines[i] ^ there;
      }
    }
    for (int i = 0; i < SIDE; i++)
      if (differs[i]) return 0;
  }
  return same_bytes(from + whole_rows * from_stride, rows - whole_rows, columns, from_stride, to + whole_rows, to_stride) &&
         same_bytes(from + whole_columns, whole_rows, columns - whole_columns, from_stride,
                    to + whole_columns * to_stride, to_stride);
}
