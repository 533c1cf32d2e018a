// What the threads of a team join, and how.
#pragma once
#include "../core/stats.h"

namespace kdfuse {

constexpr int kMaxSums = 8;

struct Sum {
  template <class T>
  KDFUSE_DEVICE_MEMBER static T join(T a, T b) {
    return a + b;
  }
  template <class T>
  KDFUSE_DEVICE_MEMBER static T pad(T) {
    return 0;
  }
};

struct Max {
  template <class T>
  KDFUSE_DEVICE_MEMBER static T join(T a, T b) {
    return b > a ? b : a;
  }
  KDFUSE_DEVICE_MEMBER static float join(float a, float b) { return fmaxf(a, b); }
  template <class T>
  KDFUSE_DEVICE_MEMBER static T pad(T any) {
    return any;
  }
};

// Numbers of every thread that are joined at a barrier, with others or alone.
template <class Join, class T, int n>
struct Joint {
  static_assert(n <= kMaxSums, "parts have no room for so many numbers");
  T (&x)[n];
};

template <class Join, class T, int n>
KDFUSE_DEVICE Joint<Join, T, n> joint(T (&x)[n]) {
  return {x};
}

}  // namespace kdfuse
