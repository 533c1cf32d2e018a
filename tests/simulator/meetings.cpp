// Where threads wait for each other: barriers, shuffles, clusters, fences and atomics, and copies on their way.
#include <cstring>

#include "world.h"

namespace simulator {
namespace {

bool same(const Site& a, const Site& b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

// The last of `expected` to come calls meet_one with all of them, and they go on. orders: what they access, too.
template <class F>
void meet(Meeting& m, Fibre& f, size_t expected, const Site& site, bool orders, F meet_one) {
  void* const order = m.order.at(m.number);
  if (orders) release(order);
  if (m.here.empty()) {
    m.site = site;
  } else if (!same(m.site, site)) {
    fail("divergent barrier: " + place_of(f) + " is at " + line_of(site) + ", " + place_of(*m.here[0]) + " at " +
         line_of(m.site));
  }
  m.here.push_back(&f);
  if (m.here.size() < expected) {
    wait(f, site);
    if (orders) acquire(order);
    return;
  }
  ++m.number;
  if (orders) acquire(order);
  std::vector<Fibre*> all;
  all.swap(m.here);
  meet_one(all);
  for (Fibre* other : all) {
    if (other != &f) make_ready(*other);
  }
  if (machine->draw(2)) yield_now(f);
}

void merge(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
  if (from.empty()) return;
  if (into.empty()) into.resize(from.size());
  for (size_t k = 0; k < from.size(); ++k) into[k] = std::max(into[k], from[k]);
}

void bring(Copy& copy) {
  if (copy.landed) return;
  const Unwatched ours;
  std::memcpy(copy.to, copy.from, copy.bytes - copy.zeros);
  std::memset(copy.to + copy.bytes - copy.zeros, 0, copy.zeros);
  copy.landed = true;
}

// Copies may land at any time.
void bring_some(Fibre& f) {
  for (Copy& copy : f.copies) {
    if (machine->draw(4) == 0) bring(copy);
  }
}

}  // namespace

void sync_warp(const Site& site) {
  const Unwatched ours;
  Fibre& f = *current();
  bring_some(f);
  meet(f.block->warps[f.thread / kWarp], f, kWarp, site, true, [](std::vector<Fibre*>& all) {
    ++counts().warp_barriers;
    for (Fibre* x : all) ++x->now.warp;
  });
}

uint64_t shuffle(unsigned mask, uint64_t value, int lane, const Site& site) {
  const Unwatched ours;
  Fibre& f = *current();
  bring_some(f);
  if (mask != 0xffffffffu) fail("a shuffle of some lanes only: " + place_of(f) + " at " + line_of(site));
  if (lane < 0 || lane >= static_cast<int>(kWarp)) fail("a shuffle from lane " + std::to_string(lane));
  f.given = value, f.from = lane;
  meet(f.block->warps[f.thread / kWarp], f, kWarp, site, false, [](std::vector<Fibre*>& all) {
    ++counts().shuffles;
    uint64_t given[kWarp];
    for (Fibre* x : all) given[x->thread % kWarp] = x->given;
    for (Fibre* x : all) x->got = given[x->from];
  });
  return f.got;
}

void sync_block(const Site& site) {
  const Unwatched ours;
  Fibre& f = *current();
  bring_some(f);
  Block& b = *f.block;
  f.fenced = false, f.word = nullptr;
  meet(b.meeting, f, machine->shape.threads, site, true, [&b](std::vector<Fibre*>& all) {
    ++counts().block_barriers;
    std::vector<uint32_t> known, seen;
    for (Fibre* x : all) {
      ++x->now.block;
      b.unfenced |= x->unfenced, x->unfenced = false;
      merge(known, x->known), merge(seen, x->seen);
    }
    if (known.empty() && seen.empty()) return;
    for (Fibre* x : all) x->known = known, x->seen = seen;
  });
}

void sync_grid(const Site& site) {
  const Unwatched ours;
  Fibre& f = *current();
  bring_some(f);
  if (!machine->shape.together) fail("grid.sync() in a launch that is not cooperative");
  meet(machine->grid, f, size_t{machine->shape.threads} * machine->shape.blocks, site, true,
       [](std::vector<Fibre*>& all) {
         ++counts().grid_barriers;
         for (Fibre* x : all) ++x->now.grid, x->unfenced = false, x->block->unfenced = false;
       });
}

// Those who have left count as there.
void complete_phase(Cluster& c) {
  if (c.arrived < c.expected || c.arrived == 0) return;
  c.arrived = 0, ++c.phases;
  ++counts().cluster_barriers;
  for (Fibre* x : c.waiting) make_ready(*x);
  c.waiting.clear();
}

void arrive_at_cluster(const Site& site) {
  const Unwatched ours;
  Fibre& f = *current();
  bring_some(f);
  Cluster& c = *f.block->cluster;
  if (f.arrived != f.met) fail("a second arrival without a wait: " + place_of(f) + " at " + line_of(site));
  release(c.order.at(f.arrived));
  ++f.arrived, f.now.cluster = f.arrived;
  ++c.arrived;
  complete_phase(c);
}

void wait_for_cluster(const Site& site) {
  const Unwatched ours;
  Fibre& f = *current();
  Cluster& c = *f.block->cluster;
  if (f.arrived == f.met) fail("a wait without an arrival: " + place_of(f) + " at " + line_of(site));
  while (c.phases < f.arrived) {
    c.waiting.push_back(&f);
    wait(f, site);
  }
  acquire(c.order.at(f.met));
  f.met = f.arrived;
  if (machine->draw(2)) yield_now(f);
}

void fence() {
  const Unwatched ours;
  Fibre& f = *current();
  f.unfenced = f.block->unfenced = false;
  merge(f.known, f.seen);
  f.fenced = true;
  if (f.word) acquire(f.word);
}

unsigned begin_atomic(unsigned* at) {
  const Unwatched ours;
  Fibre& f = *current();
  yield_now(f);
  if (f.fenced) release(at);
  f.word = at, f.fenced = false;
  auto& released = machine->words.emplace(at, Machine::Word{*at, {}}).first->second.released;
  released.resize(machine->blocks.size());
  merge(f.seen, released);
  // Only what a fence stands behind is passed on.
  if (!f.unfenced && !f.block->unfenced) {
    released[f.block->index] = std::max(released[f.block->index], static_cast<uint32_t>(f.now.block));
    merge(released, f.known);
  }
  return *at;
}

void end_atomic(unsigned* at, unsigned value) { *at = value; }

void copy_async(void* to, const void* from, unsigned bytes, unsigned zeros) {
  Fibre& f = *current();
  const auto target = reinterpret_cast<uintptr_t>(to), source = reinterpret_cast<uintptr_t>(from);
  if (bytes != 16 || zeros > bytes) fail("an asynchronous copy of " + std::to_string(bytes) + " bytes");
  if (target % 16 || source % 16) fail("a misaligned asynchronous copy: " + place_of(f));
  if (zeros < bytes) access(static_cast<const char*>(from), bytes - zeros, false, __builtin_return_address(0));
  fly(f, static_cast<char*>(to), bytes);
  const Unwatched ours;
  std::memset(to, 0xff, bytes);
  f.copies.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes, zeros, f.group, false});
}

void commit_copies() { ++current()->group; }

void wait_for_copies(unsigned groups) {
  Fibre& f = *current();
  std::vector<Copy> left;
  for (Copy& copy : f.copies) {
    if (copy.group + groups >= f.group) {
      left.push_back(copy);
      continue;
    }
    bring(copy);
    land(f, copy);
  }
  f.copies.swap(left);
}

}  // namespace simulator
