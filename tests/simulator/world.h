// The state of a running grid, for turns.cpp, meetings.cpp, memory.cpp and runtime.cpp.
#pragma once
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "context.h"
#include "machine.h"
#include "order.h"
#include "simulator.h"

namespace simulator {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 128 * 1024;
constexpr size_t kSharedBytes = 227 * 1024;  // what a block can have at most

// How many barriers of each kind a thread had passed when it accessed something. Whoever has passed one more of a
// kind that both take part in comes after that access.
struct Stamp {
  uint64_t warp : 20, block : 20, cluster : 14, grid : 10;
};

// What became of two bytes of memory that a kernel may write.
struct Cell {
  Stamp stamp = {};  // of the last write
  uint32_t writer = 0;  // a thread's id, 0: nobody
  uint32_t readers = 0;  // a place in readers (memory.cpp), 0: nobody since
};
struct Reader {
  Stamp stamp;
  uint32_t id;
};

struct Region {
  const char* at;
  size_t bytes;
  std::string name;
  bool writable = false;
  bool shared = false, filled = false;  // filled: holds numbers before the launch
  // Bytes, in accesses of 16 and in smaller ones.
  uint64_t read = 0, written = 0, read_singly = 0, written_singly = 0;
  std::vector<Cell> cells = {};
};

struct Copy {
  char* to;
  const char* from;
  unsigned bytes, zeros, group;
  bool landed;
};

enum class State { ready, waiting, done };

struct Block;

struct Fibre {
  Block* block;
  unsigned thread;
  uint32_t id;
  State state = State::ready;
  Site site = {};  // where it waits
  Stamp now = {};
  unsigned arrived = 0, met = 0;  // at cluster barriers; how many of them it has waited for
  char* stack = nullptr;  // since it has begun
  Context context;
  uint64_t given = 0, got = 0;  // of a shuffle
  int from = 0;
  std::vector<Copy> copies;
  unsigned group = 0;
  bool unfenced = false;  // has written since its last fence
  // Since its last barrier: whether a fence stands before what comes next, and what an atomic has changed.
  bool fenced = false;
  unsigned* word = nullptr;
  // By block: accesses with a lower Stamp::block come before this thread, or would after a fence.
  std::vector<uint32_t> known, seen;
};

// Where a meeting and the next one are ordered, each apart: who is late to leave the one does not come after what the
// others bring to the next.
struct Order {
  char places[2];
  void* at(unsigned meeting) { return &places[meeting % 2]; }
};

struct Meeting {
  std::vector<Fibre*> here;
  Site site = {};
  unsigned number = 0;  // of meetings before this one
  Order order;
};

struct Cluster {
  unsigned expected = 0, arrived = 0, phases = 0;
  std::vector<Fibre*> waiting;
  Order order;
};

struct Block {
  unsigned index;
  Cluster* cluster;
  unsigned patience;  // it begins after so many turns of others
  std::vector<Fibre> fibres;
  std::vector<Meeting> warps;
  Meeting meeting;
  std::deque<Fibre*> ready;
  unsigned done = 0;
  bool begun = false, finished = false, turn = false;
  bool unfenced = false;
  Region dynamic, fixed;  // its shared memory
  unsigned remote = 0;  // the latest Stamp::cluster of an access from another block, plus 1
  Context home;  // of its loop
  std::condition_variable wake;
  std::thread host;
};

struct Shape {
  unsigned blocks, threads, cluster;
  size_t bytes;
  bool together;
};

struct Machine {
  Shape shape;
  Body body = {};
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Cluster> clusters;
  Meeting grid;
  unsigned finished = 0, admitted = 0;
  uint64_t random = 1;
  unsigned policy = 0;
  std::string failed;
  std::mutex mutex;
  std::condition_variable over;
  struct Word {
    unsigned before;  // the launch
    std::vector<uint32_t> released;  // by block: accesses with a lower Stamp::block
  };
  std::map<unsigned*, Word> words;  // that atomics have changed

  uint32_t draw(uint32_t below);
};

// turns.cpp
extern Machine* machine;
Fibre* current();
// Ends the launch; never returns to the thread that it is called from.
void fail(const std::string& what);
std::string place_of(const Fibre& f);
std::string line_of(const Site& site);
void make_ready(Fibre& f);
void wait(Fibre& f, const Site& site);  // until somebody makes it ready
void yield_now(Fibre& f);  // lets others go on
// Runs a grid; returns what went wrong, or "".
std::string run_grid(const Shape& shape, const Body& body, uint64_t seed);

// meetings.cpp
void complete_phase(Cluster& c);  // where all threads that are left have arrived

// memory.cpp
void forget_readers();
void access(const char* at, unsigned bytes, bool write, const void* pc);
void fly(Fibre& f, char* to, unsigned bytes);  // marks what a copy has been asked for
void land(Fibre& f, const Copy& copy);  // marks what a copy has brought

// runtime.cpp
std::vector<Region>& memory();  // of the device
Counts& counts();  // of a call's launches
const Device& device_in_use();
uint64_t seed_in_use();

}  // namespace simulator
