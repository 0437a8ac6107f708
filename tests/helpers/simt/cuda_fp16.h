// fp16 for simt.h.
#pragma once
#include "simt.h"

struct __half {
  uint16_t bits;
  __half() = default;
  __half(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    const uint16_t sign = uint16_t(u >> 16 & 0x8000);
    const float size = fabsf(x);
    if (x != x) bits = 0x7fff;
    else if (size >= 65520.0f) bits = sign | 0x7c00;
    else if (size < 0x1p-14f) bits = sign | uint16_t(lrintf(size * 0x1p24f));  // subnormal, rounded to even
    else {
      u &= 0x7fffffff;
      bits = sign | uint16_t((u - (112u << 23) + 0xfff + (u >> 13 & 1)) >> 13);
    }
  }
  operator float() const {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                       : exponent     ? std::ldexp(float(1024 + fraction), exponent - 25)
                                      : std::ldexp(float(fraction), -24);
    return bits & 0x8000 ? -size : size;
  }
};
struct alignas(4) __half2 { __half x, y; };
inline float2 __half22float2(__half2 v) { return {float(v.x), float(v.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __hmax2(__half2 a, __half2 b) { return {__half(fmaxf(a.x, b.x)), __half(fmaxf(a.y, b.y))}; }
