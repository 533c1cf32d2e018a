// What becomes of each access of a kernel. The compiler calls access() before each one: the kernels are compiled
// with -fsanitize=thread, whose hooks (hooks.cpp) lead here.
//
// An access must lie inside what the kernel may touch, and on its own alignment; read what has been written and
// has arrived; and come after whatever it meets there, by barriers or by fences around atomics.
#include <cstring>

#include "world.h"

namespace simulator {
namespace {

constexpr uint32_t kFlying = 1u << 31;  // in Cell::writer: a copy is on its way
constexpr uint32_t kBefore = kFlying - 1;  // a launch before this one has written
constexpr size_t kCellBytes = 2;

std::vector<std::vector<Reader>> readers(1);

std::string text(const char* at, const Region& r, unsigned bytes) {
  return std::to_string(bytes) + " bytes at " + std::to_string(at - r.at) + " of " + r.name;
}

std::string doing(const Fibre& f, bool write) { return place_of(f) + (write ? " writes " : " reads "); }

std::string hex(const void* pc) {
  char buffer[32];
  std::snprintf(buffer, sizeof(buffer), "@%p", pc);
  return buffer;
}

unsigned block_of(uint32_t id) { return (id - 1) / machine->shape.threads; }

std::string name_of(uint32_t id) {
  return "block " + std::to_string(block_of(id)) + ", thread " + std::to_string((id - 1) % machine->shape.threads);
}

bool comes_after(const Fibre& f, const Stamp& stamp, uint32_t id) {
  const unsigned block = block_of(id), own = f.block->index, size = machine->shape.cluster;
  if (f.now.grid > stamp.grid) return true;
  if (block / size == own / size && f.met > stamp.cluster) return true;
  if (block == own && f.now.block > stamp.block) return true;
  if (block == own && (id - 1) % machine->shape.threads / kWarp == f.thread / kWarp && f.now.warp > stamp.warp) {
    return true;
  }
  return !f.known.empty() && f.known[block] > stamp.block;
}

Region* region_of(const char* at) {
  for (Region& r : memory()) {
    if (at >= r.at && at < r.at + r.bytes) return &r;
  }
  return nullptr;
}

// The shared memory of any block of the cluster.
Region* shared_region(Fibre& f, const char* at, Block*& owner) {
  const unsigned size = machine->shape.cluster, first = f.block->index / size * size;
  for (unsigned k = 0; k < size; ++k) {
    Block* const b = machine->blocks[first + (f.block->index - first + k) % size].get();  // the own one first
    if (!b || !b->begun) continue;
    for (Region* r : {&b->dynamic, &b->fixed}) {
      if (at >= r->at && at < r->at + r->bytes) {
        owner = b;
        return r;
      }
    }
  }
  return nullptr;
}

void check_remote(Fibre& f, Block& owner, const char* at, const Region& r, unsigned bytes, const void* pc) {
  const std::string who = place_of(f), what = text(at, r, bytes) + " of block " + std::to_string(owner.index);
  if (f.met == 0) {
    fail("remote memory: " + who + " reaches " + what + ", which is not known to have begun " + hex(pc));
  }
  if (owner.finished) fail("remote memory: " + who + " reaches " + what + ", which has left " + hex(pc));
  owner.remote = std::max<unsigned>(owner.remote, f.now.cluster + 1);
}

void check_cells(Fibre& f, Region& r, const char* at, unsigned bytes, bool write, const void* pc) {
  if (r.cells.empty()) r.cells.resize((r.bytes + kCellBytes - 1) / kCellBytes);
  const size_t first = static_cast<size_t>(at - r.at) / kCellBytes, last = (at - r.at + bytes - 1) / kCellBytes;
  for (size_t k = first; k <= last; ++k) {
    Cell& cell = r.cells[k];
    const auto report = [&](const std::string& what) {
      fail(what + ": " + doing(f, write) + text(at, r, bytes) + " " + hex(pc));
    };
    if (cell.writer & kFlying) return report("a copy is still on its way there");
    if (cell.writer && cell.writer != kBefore && cell.writer != f.id && !comes_after(f, cell.stamp, cell.writer)) {
      return report("a race with a write of " + name_of(cell.writer));
    }
    if (!write) {
      if (!cell.writer && !r.filled) return report("nobody has written there");
      if (cell.readers == 0) {
        cell.readers = static_cast<uint32_t>(readers.size());
        readers.emplace_back();
      }
      auto& all = readers[cell.readers];
      bool found = false;
      for (Reader& x : all) {
        if (x.id == f.id) x.stamp = f.now, found = true;
      }
      if (!found) all.push_back({f.now, f.id});
      continue;
    }
    for (const Reader& x : readers[cell.readers]) {
      if (x.id != f.id && !comes_after(f, x.stamp, x.id)) return report("a race with a read of " + name_of(x.id));
    }
    if (cell.readers) readers[cell.readers].clear();
    cell.stamp = f.now, cell.writer = f.id;
  }
}

}  // namespace

void forget_readers() {
  readers.assign(1, {});
  for (Region& r : memory()) {
    for (Cell& cell : r.cells) cell = {{}, cell.writer ? kBefore : 0, 0};
  }
}

void access(const char* at, unsigned bytes, bool write, const void* pc) {
  if (kSanitized) return tell(at, bytes, write);
  Fibre* const f = current();
  if (!f || machine == nullptr || !machine->failed.empty()) return;
  if (at >= f->stack && at < f->stack + kStack) return;
  Block* owner = nullptr;
  Region* r = shared_region(*f, at, owner);
  if (!r) r = region_of(at);
  if (!r) {
    // Beside what there is, by a few bytes as a rule: the nearest says what was meant.
    const Region* near = nullptr;
    for (const Region& x : memory()) {
      if (at >= x.at + x.bytes && (!near || x.at > near->at)) near = &x;
    }
    const std::string where =
        near && at - near->at < static_cast<long>(near->bytes) + 4096 ? text(at, *near, bytes) : "nothing known";
    return fail("out of bounds: " + doing(*f, write) + where + " " + hex(pc));
  }
  if (at + bytes > r->at + r->bytes) {
    return fail("out of bounds: " + doing(*f, write) + text(at, *r, bytes) + ", which has " + std::to_string(r->bytes) +
                " " + hex(pc));
  }
  const bool together = bytes <= 16 && (bytes & (bytes - 1)) == 0;  // else a part of a copy, or several accesses
  if (together && reinterpret_cast<uintptr_t>(at) % bytes) {
    return fail("misaligned: " + doing(*f, write) + text(at, *r, bytes) + " " + hex(pc));
  }
  if (write && !r->writable) return fail("read-only: " + doing(*f, write) + text(at, *r, bytes) + " " + hex(pc));
  if (owner && owner != f->block) {
    check_remote(*f, *owner, at, *r, bytes, pc);
    counts().remote_stores += write;
  }
  if (!r->shared) {
    const bool whole = bytes == 16;
    (write ? whole ? r->written : r->written_singly : whole ? r->read : r->read_singly) += bytes;
    if (write) f->unfenced = true;
  }
  if (r->writable) check_cells(*f, *r, at, bytes, write, pc);
  if (machine->draw(256) == 0) yield_now(*f);
}

void* of_block(void* at, int block) {
  const Unwatched ours;
  Fibre& f = *current();
  const unsigned size = machine->shape.cluster;
  if (block < 0 || block >= static_cast<int>(size)) fail("block " + std::to_string(block) + " of a cluster");
  Block& other = *machine->blocks[f.block->index / size * size + block];
  // Before it has begun it has no memory at all.
  if (!other.begun) {
    fail("remote memory: " + place_of(f) + " reaches into block " + std::to_string(other.index) +
         ", which has not begun");
  }
  const char* const here = static_cast<char*>(at);
  for (auto part : {&Block::dynamic, &Block::fixed}) {
    const Region& own = f.block->*part;
    if (here >= own.at && here < own.at + own.bytes) return const_cast<char*>((other.*part).at) + (here - own.at);
  }
  fail("map_shared_rank of what is not shared memory: " + place_of(f));
  return nullptr;
}

void copy_16(void* to, const void* from) {
  const void* const pc = __builtin_return_address(0);
  access(static_cast<const char*>(from), 16, false, pc);
  access(static_cast<const char*>(to), 16, true, pc);
  const Unwatched ours;
  std::memcpy(to, from, 16);
}

void fly(Fibre& f, char* to, unsigned bytes) {
  if (kSanitized) return tell(to, bytes, true);
  access(to, bytes, true, __builtin_return_address(0));
  for (unsigned k = 0; k < bytes; k += kCellBytes) {
    Region& r = f.block->dynamic;
    r.cells[static_cast<size_t>(to + k - r.at) / kCellBytes].writer |= kFlying;
  }
}

void land(Fibre& f, const Copy& copy) {
  if (kSanitized) return tell(copy.to, copy.bytes, true);
  Region& r = f.block->dynamic;
  for (unsigned k = 0; k < copy.bytes; k += kCellBytes) {
    Cell& cell = r.cells[static_cast<size_t>(copy.to + k - r.at) / kCellBytes];
    cell.writer = f.id, cell.stamp = f.now;
  }
}

}  // namespace simulator
