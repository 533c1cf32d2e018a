// How blocks, warps and threads run, and where they wait for each other.
#include <link.h>
#include <sys/mman.h>

#include <cstring>

#include "include/cuda_runtime.h"
#include "world.h"

namespace kdfuse {
// The dynamic shared memory of the kernels.
alignas(1024) __constinit __shared__ uint4 block_memory[simulator::kSharedBytes / sizeof(uint4)] = {};
}  // namespace kdfuse

namespace simulator {

Machine* machine = nullptr;

namespace {

thread_local Fibre* running = nullptr;

std::vector<char*>& stacks() {
  static std::vector<char*> free;
  return free;
}

char* take_stack() {
  auto& free = stacks();
  if (free.empty()) {
    constexpr size_t count = 256;
    char* const all = static_cast<char*>(
        mmap(nullptr, count * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (all == MAP_FAILED) std::abort();
    for (size_t k = 0; k < count; ++k) free.push_back(all + k * kStack);
  }
  char* const stack = free.back();
  free.pop_back();
  return stack;
}

}  // namespace

Fibre* current() { return running; }

uint32_t Machine::draw(uint32_t below) {
  random ^= random << 13, random ^= random >> 7, random ^= random << 17;
  return static_cast<uint32_t>((random >> 11) % below);
}

std::string place_of(const Fibre& f) {
  return "block " + std::to_string(f.block->index) + ", thread " + std::to_string(f.thread);
}

namespace {

std::string at(const Site& site) {
  const char* const file = std::strrchr(site.file, '/');
  return std::string(site.what) + " (" + (file ? file + 1 : site.file) + ":" + std::to_string(site.line) + ")";
}

bool same(const Site& a, const Site& b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

// Back to the block's loop.
void leave(Fibre& f) { go(f.context, f.block->home, f.state == State::done); }

void begin_fibre() {
  Fibre& f = *running;
  arrive(f.block->home);
  machine->body.run(machine->body.given);
  f.state = State::done;
  leave(f);
}

void resume(Fibre& f) {
  running = &f;
  if (f.stack) {
    go(f.block->home, f.context, false);
  } else {
    f.stack = take_stack();
    begin(f.block->home, f.context, f.stack, kStack, begin_fibre);
  }
  running = nullptr;
}

void make_ready(Fibre& f) {
  f.state = State::ready;
  f.block->ready.push_back(&f);
}

void wait(Fibre& f, const Site& site) {
  f.state = State::waiting, f.site = site;
  leave(f);
}

}  // namespace

void yield_now(Fibre& f) {
  make_ready(f);
  leave(f);
}

void fail(const std::string& what) {
  if (machine->failed.empty()) machine->failed = what;
  if (!running) return;
  running->state = State::done;
  leave(*running);
}

namespace {

// The last of `expected` to come calls meet_one with all of them, and they go on.
template <class F>
void meet(Meeting& m, Fibre& f, size_t expected, const Site& site, F meet_one) {
  if (m.here.empty()) {
    m.site = site;
  } else if (!same(m.site, site)) {
    fail("divergent barrier: " + place_of(f) + " is at " + at(site) + ", " + place_of(*m.here[0]) + " at " +
         at(m.site));
  }
  m.here.push_back(&f);
  if (m.here.size() < expected) return wait(f, site);
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

void land_some(Fibre& f) {
  for (Copy& copy : f.copies) {
    if (copy.landed || machine->draw(4)) continue;
    std::memcpy(copy.to, copy.from, copy.bytes - copy.zeros);
    std::memset(copy.to + copy.bytes - copy.zeros, 0, copy.zeros);
    copy.landed = true;
  }
}

}  // namespace

Index thread_index() { return {running->thread, 0, 0}; }
Index block_index() { return {running->block->index, 0, 0}; }
Index block_size() { return {machine->shape.threads, 1, 1}; }
Index grid_size() { return {machine->shape.blocks, 1, 1}; }
unsigned cluster_size() { return machine->shape.cluster; }

void sync_warp(const Site& site) {
  Fibre& f = *running;
  land_some(f);
  meet(f.block->warps[f.thread / kWarp], f, kWarp, site, [](std::vector<Fibre*>& all) {
    ++counts().warp_barriers;
    for (Fibre* x : all) ++x->now.warp;
  });
}

uint64_t shuffle(unsigned mask, uint64_t value, int lane, const Site& site) {
  Fibre& f = *running;
  land_some(f);
  if (mask != 0xffffffffu) fail("a shuffle of some lanes only: " + place_of(f) + " at " + at(site));
  if (lane < 0 || lane >= static_cast<int>(kWarp)) fail("a shuffle from lane " + std::to_string(lane));
  f.given = value, f.from = lane;
  meet(f.block->warps[f.thread / kWarp], f, kWarp, site, [](std::vector<Fibre*>& all) {
    ++counts().shuffles;
    uint64_t given[kWarp];
    for (Fibre* x : all) given[x->thread % kWarp] = x->given;
    for (Fibre* x : all) x->got = given[x->from];
  });
  return f.got;
}

void sync_block(const Site& site) {
  Fibre& f = *running;
  land_some(f);
  Block& b = *f.block;
  meet(b.meeting, f, machine->shape.threads, site, [&b](std::vector<Fibre*>& all) {
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
  Fibre& f = *running;
  land_some(f);
  if (!machine->shape.together) fail("grid.sync() in a launch that is not cooperative");
  meet(machine->grid, f, size_t{machine->shape.threads} * machine->shape.blocks, site, [](std::vector<Fibre*>& all) {
    ++counts().grid_barriers;
    for (Fibre* x : all) ++x->now.grid, x->unfenced = false, x->block->unfenced = false;
  });
}

namespace {

// Those who have left count as there.
void complete_phase(Cluster& c) {
  if (c.arrived < c.expected || c.arrived == 0) return;
  c.arrived = 0, ++c.phases;
  ++counts().cluster_barriers;
  for (Fibre* x : c.waiting) make_ready(*x);
  c.waiting.clear();
}

}  // namespace

void arrive_at_cluster(const Site& site) {
  Fibre& f = *running;
  land_some(f);
  Cluster& c = *f.block->cluster;
  if (f.arrived != f.met) fail("a second arrival without a wait: " + place_of(f) + " at " + at(site));
  ++f.arrived, f.now.cluster = f.arrived;
  ++c.arrived;
  complete_phase(c);
}

void wait_for_cluster(const Site& site) {
  Fibre& f = *running;
  Cluster& c = *f.block->cluster;
  if (f.arrived == f.met) fail("a wait without an arrival: " + place_of(f) + " at " + at(site));
  while (c.phases < f.arrived) {
    c.waiting.push_back(&f);
    wait(f, site);
  }
  f.met = f.arrived;
  if (machine->draw(2)) yield_now(f);
}

void* of_block(void* at, int block) {
  Fibre& f = *running;
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

void fence() {
  Fibre& f = *running;
  f.unfenced = f.block->unfenced = false;
  merge(f.known, f.seen);
}

unsigned begin_atomic(unsigned* at) {
  Fibre& f = *running;
  yield_now(f);
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
  Fibre& f = *running;
  const auto target = reinterpret_cast<uintptr_t>(to), source = reinterpret_cast<uintptr_t>(from);
  if (bytes != 16 || zeros > bytes) fail("an asynchronous copy of " + std::to_string(bytes) + " bytes");
  if (target % 16 || source % 16) fail("a misaligned asynchronous copy: " + place_of(f));
  if (zeros < bytes) access(static_cast<const char*>(from), bytes - zeros, false, __builtin_return_address(0));
  fly(f, static_cast<char*>(to), bytes);
  std::memset(to, 0xff, bytes);
  f.copies.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes, zeros, f.group, false});
}

void commit_copies() { ++running->group; }

void wait_for_copies(unsigned groups) {
  Fibre& f = *running;
  std::vector<Copy> left;
  for (Copy& copy : f.copies) {
    if (copy.group + groups >= f.group) {
      left.push_back(copy);
      continue;
    }
    if (!copy.landed) {
      std::memcpy(copy.to, copy.from, copy.bytes - copy.zeros);
      std::memset(copy.to + copy.bytes - copy.zeros, 0, copy.zeros);
    }
    land(f, copy);
  }
  f.copies.swap(left);
}

// The order of blocks.

namespace {

// This thread's part of the module's thread-local memory: the blocks' shared memory and a few words of ours.
int find_own(dl_phdr_info* info, size_t, void* found) {
  for (int k = 0; k < info->dlpi_phnum; ++k) {
    const auto& header = info->dlpi_phdr[k];
    const char* const start = static_cast<const char*>(info->dlpi_tls_data);
    const char* const own = reinterpret_cast<const char*>(&running);
    if (header.p_type != PT_TLS || !start || own < start || own >= start + header.p_memsz) continue;
    *static_cast<std::pair<char*, size_t>*>(found) = {const_cast<char*>(start), header.p_memsz};
    return 1;
  }
  return 0;
}

void find_memory(Block& b) {
  char* const dynamic = reinterpret_cast<char*>(kdfuse::block_memory);
  std::pair<char*, size_t> own = {nullptr, 0};
  dl_iterate_phdr(find_own, &own);
  if (!own.first) std::abort();
  // All of it but the dynamic memory is the kernels' static memory.
  b.dynamic = {dynamic, machine->shape.bytes, "dynamic shared memory", true, true};
  b.fixed = {own.first, own.second, "static shared memory", true, true};
  Fibre* const keep = running;
  std::memset(own.first, 0xff, dynamic - own.first);
  char* const behind = dynamic + kSharedBytes;
  std::memset(dynamic, 0xff, machine->shape.bytes);
  std::memset(behind, 0xff, own.first + own.second - behind);
  running = keep;
}

bool can_run(const Block& b) { return !b.finished && (b.begun ? !b.ready.empty() : true); }

std::string stuck() {
  std::string text = "nobody can go on:";
  for (const auto& b : machine->blocks) {
    if (!b || b->finished) continue;
    std::map<std::string, std::pair<unsigned, unsigned>> waiting;  // how many, the first of them
    for (const Fibre& f : b->fibres) {
      const std::string where = f.state == State::done ? "has left" : "waits at " + at(f.site);
      auto& found = waiting.emplace(where, std::make_pair(0u, f.thread)).first->second;
      ++found.first;
    }
    for (const auto& [where, found] : waiting) {
      text += " block " + std::to_string(b->index) + ": thread " + std::to_string(found.second) +
              (found.first > 1 ? " and " + std::to_string(found.first - 1) + " more" : "") + " " + where + ";";
    }
  }
  return text;
}

void run_block(Block& b, std::unique_lock<std::mutex>& lock);

void start_host(Block& b) {
  b.host = std::thread([&b] {
    std::unique_lock<std::mutex> lock(machine->mutex);
    b.wake.wait(lock, [&] { return b.turn; });
    run_block(b, lock);
  });
}

// A cluster at a time comes to the device.
void admit() {
  const Shape& s = machine->shape;
  for (unsigned k = 0; k < s.cluster; ++k) {
    const unsigned index = machine->admitted++;
    auto b = std::make_unique<Block>();
    b->index = index, b->cluster = &machine->clusters[index / s.cluster];
    b->patience = machine->draw(3) ? machine->draw(4) : machine->draw(64);
    machine->blocks[index] = std::move(b);
    start_host(*machine->blocks[index]);
  }
}

// Whose turn is next; null: nobody's, all is over.
Block* next_block() {
  std::vector<Block*> open;
  for (const auto& b : machine->blocks) {
    if (!b || b->finished) continue;
    if (!machine->failed.empty()) return b.get();
    if (!can_run(*b)) continue;
    if (!b->begun && b->patience > 0) {
      --b->patience;
      continue;
    }
    open.push_back(b.get());
  }
  if (open.empty()) {
    for (const auto& b : machine->blocks) {
      if (b && can_run(*b)) return b.get();
    }
    if (!machine->failed.empty() || machine->finished == machine->shape.blocks) return nullptr;
    machine->failed = stuck();
    return next_block();
  }
  return open[machine->draw(static_cast<uint32_t>(open.size()))];
}

Fibre* next_fibre(Block& b) {
  auto& ready = b.ready;
  size_t at = 0;
  if (machine->policy == 0) at = machine->draw(static_cast<uint32_t>(ready.size()));
  if (machine->policy == 1) at = ready.size() - 1;
  Fibre* const f = ready[at];
  ready.erase(ready.begin() + static_cast<long>(at));
  return f;
}

void run_block(Block& b, std::unique_lock<std::mutex>& lock) {
  const auto pass = [&] {
    Block* const next = next_block();
    if (next == &b) return;
    b.turn = false;
    if (next) {
      next->turn = true;
      next->wake.notify_one();
    } else {
      machine->over.notify_one();
    }
    if (!b.finished) b.wake.wait(lock, [&] { return b.turn; });
  };
  if (machine->failed.empty()) {
    find_memory(b);
    b.begun = true;
    const unsigned threads = machine->shape.threads;
    b.fibres.resize(threads), b.warps.resize((threads + kWarp - 1) / kWarp);
    for (unsigned k = 0; k < threads; ++k) {
      b.fibres[k].block = &b, b.fibres[k].thread = k, b.fibres[k].id = b.index * threads + k + 1;
      b.ready.push_back(&b.fibres[k]);
    }
  }
  while (machine->failed.empty() && b.done < b.fibres.size()) {
    if (b.ready.empty() || machine->draw(64) == 0) {
      pass();
      continue;
    }
    Fibre* const f = next_fibre(b);
    resume(*f);
    if (f->state != State::done) continue;
    ++b.done;
    stacks().push_back(f->stack);
    f->stack = nullptr;
    Cluster& c = *b.cluster;
    --c.expected;
    complete_phase(c);
    if (machine->failed.empty() && b.remote > f->met) {
      machine->failed = place_of(*f) + " leaves while other blocks of its cluster may still reach its memory";
    }
  }
  for (Fibre& f : b.fibres) {
    if (f.stack) stacks().push_back(f.stack);
  }
  b.finished = true, b.begun = true;
  ++machine->finished;
  if (machine->failed.empty() && machine->admitted < machine->shape.blocks && b.index % machine->shape.cluster == 0) {
    admit();
  }
  pass();
}

}  // namespace

std::string run_grid(const Shape& shape, const Body& body, uint64_t seed) {
  Machine m;
  machine = &m;
  forget_readers();
  m.shape = shape, m.body = body;
  m.random = seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull, m.policy = seed % 3;
  for (int k = 0; k < 8; ++k) m.draw(2);
  m.blocks.resize(shape.blocks);
  m.clusters.resize(shape.blocks / shape.cluster);
  for (Cluster& c : m.clusters) c.expected = shape.cluster * shape.threads;
  {
    std::unique_lock<std::mutex> lock(m.mutex);
    const unsigned clusters = shape.blocks / shape.cluster;
    const unsigned at_once = shape.together ? clusters : std::min(clusters, 1 + m.draw(4));
    for (unsigned k = 0; k < at_once; ++k) admit();
    Block* const first = next_block();
    first->turn = true;
    first->wake.notify_one();
    m.over.wait(lock, [&] { return m.finished == m.admitted && (m.admitted == shape.blocks || !m.failed.empty()); });
  }
  for (auto& b : m.blocks) {
    if (b && b->host.joinable()) b->host.join();
  }
  machine = nullptr;
  // A GPU's context ends with a fault; here the next launch finds its tickets as this one did.
  if (!m.failed.empty()) {
    for (auto& [at, word] : m.words) *at = word.before;
  }
  return m.failed;
}

}  // namespace simulator

// An assertion of a kernel ends its launch, not this process.
extern "C" __attribute__((visibility("hidden"), noreturn)) void __assert_fail(const char* what, const char* file,
                                                                              unsigned line, const char*) noexcept {
  simulator::fail("assertion: " + simulator::at({what, file, static_cast<int>(line)}));
  std::abort();
}
