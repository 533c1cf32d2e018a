// How blocks and their threads take turns: one fibre runs at a time, of all blocks, and which one is drawn.
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

std::string line_of(const Site& site) {
  const char* const file = std::strrchr(site.file, '/');
  return std::string(site.what) + " (" + (file ? file + 1 : site.file) + ":" + std::to_string(site.line) + ")";
}

namespace {

// Back to the block's loop.
void leave(Fibre& f) { go(f.context, f.block->home, f.state == State::done); }

void begin_fibre() {
  Fibre& f = *running;
  arrive(f.block->home);
  machine->body.run(machine->body.given);
  f.state = State::done;
  release(machine);  // what follows the launch comes after all of it
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

}  // namespace

void make_ready(Fibre& f) {
  f.state = State::ready;
  f.block->ready.push_back(&f);
}

void wait(Fibre& f, const Site& site) {
  f.state = State::waiting, f.site = site;
  leave(f);
}

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

Index thread_index() { return {running->thread, 0, 0}; }
Index block_index() { return {running->block->index, 0, 0}; }
Index block_size() { return {machine->shape.threads, 1, 1}; }
Index grid_size() { return {machine->shape.blocks, 1, 1}; }
unsigned cluster_size() { return machine->shape.cluster; }

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
      const std::string where = f.state == State::done ? "has left" : "waits at " + line_of(f.site);
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
    const Unwatched ours;
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
    discard(f->context);
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
  acquire(machine);
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
  simulator::fail("assertion: " + simulator::line_of({what, file, static_cast<int>(line)}));
  std::abort();
}
