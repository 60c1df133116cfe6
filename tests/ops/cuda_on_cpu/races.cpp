// Which accesses to watched memory no barrier orders. The kernels are compiled with -fsanitize=thread, which calls a
// function for each of their accesses; these are the functions, so that no other library is needed.
//
// A thread has seen of every other all that this did before a barrier of both. A read must have seen the last write, a
// write besides the reads since. Shuffles order nothing. Threads of other clusters are never seen, other launches
// always.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <utility>
#include <vector>

namespace {

struct Thread {
  std::shared_ptr<const std::vector<unsigned>> seen;  // of each of its cluster: the time until which
  unsigned now = 1;
};

struct Access {
  unsigned cluster, thread, time;
};

struct Cell {  // two bytes
  Access writer{};
  std::vector<Access> readers;
  bool written = false;
};

struct Region {
  std::vector<Cell> cells;
  bool shared;
};

std::vector<Thread> threads;
std::map<uintptr_t, Region> regions;  // by their first byte
unsigned cluster, current, found;
bool running;

bool seen(const Access& a) {
  return a.cluster == cluster && (a.thread == current || (*threads[current].seen)[a.thread] >= a.time);
}

void report(const char* what, const Access& a, uintptr_t begin, uintptr_t at, const Region& region) {
  if (!found++)
    std::fprintf(stderr, "CUDA on CPU: a race: %s by thread %u, thread %u before, byte %zu of %s memory\n", what,
                 current, a.thread, static_cast<size_t>(at - begin), region.shared ? "shared" : "global");
}

}  // namespace

extern "C" {

// How many there were since the last call.
unsigned races() { return std::exchange(found, 0); }

void race_launch() {
  for (auto region = regions.begin(); region != regions.end();) {
    if (region->second.shared) {
      region = regions.erase(region);
    } else {
      region->second.cells.assign(region->second.cells.size(), {});
      ++region;
    }
  }
}
void race_cluster(unsigned index, unsigned count) {
  std::erase_if(regions, [](const auto& region) { return region.second.shared; });
  cluster = index;
  threads.assign(count, {std::make_shared<std::vector<unsigned>>(count, 0)});
}
void race_watch(const void* begin, size_t bytes, bool shared) {
  regions[reinterpret_cast<uintptr_t>(begin)] = {std::vector<Cell>((bytes + 1) / 2), shared};
}
void race_forget() { regions.clear(); }
void race_switch(unsigned thread, bool in_kernel) { current = thread, running = in_kernel; }

void race_barrier(const unsigned* members, unsigned n) {
  auto merged = std::make_shared<std::vector<unsigned>>(threads.size(), 0);
  const std::vector<unsigned>* last = nullptr;
  for (unsigned i = 0; i < n; ++i) {
    const Thread& t = threads[members[i]];
    if (t.seen.get() != last)
      for (size_t j = 0; j < threads.size(); ++j) (*merged)[j] = std::max((*merged)[j], (*t.seen)[j]);
    last = t.seen.get();
    (*merged)[members[i]] = std::max((*merged)[members[i]], t.now);
  }
  for (unsigned i = 0; i < n; ++i) threads[members[i]].seen = merged, ++threads[members[i]].now;
}

void race_access(const void* address, size_t bytes, bool writes) {
  if (!running) return;
  const auto at = reinterpret_cast<uintptr_t>(address);
  auto region = regions.upper_bound(at);
  if (region == regions.begin()) return;
  --region;
  auto& cells = region->second.cells;
  if (at - region->first >= 2 * cells.size()) return;
  const Access mine{cluster, current, threads[current].now};
  for (uintptr_t i = (at - region->first) / 2; i < std::min<size_t>((at - region->first + bytes + 1) / 2, cells.size());
       ++i) {
    Cell& cell = cells[i];
    if (cell.written && !seen(cell.writer))
      report(writes ? "a write" : "a read", cell.writer, region->first, at, region->second);
    if (writes) {
      for (const Access& reader : cell.readers)
        if (!seen(reader)) report("a write after a read", reader, region->first, at, region->second);
      cell.readers.clear();
      cell.writer = mine;
      cell.written = true;
    } else {
      std::erase_if(cell.readers, [](const Access& a) { return a.cluster == cluster && a.thread == current; });
      cell.readers.push_back(mine);
    }
  }
}

#define EEKD_ACCESS(n)                                                 \
  void __tsan_read##n(void* x) { race_access(x, n, false); }           \
  void __tsan_write##n(void* x) { race_access(x, n, true); }           \
  void __tsan_unaligned_read##n(void* x) { race_access(x, n, false); } \
  void __tsan_unaligned_write##n(void* x) { race_access(x, n, true); } \
  void __tsan_volatile_read##n(void* x) { race_access(x, n, false); }  \
  void __tsan_volatile_write##n(void* x) { race_access(x, n, true); }
EEKD_ACCESS(1)
EEKD_ACCESS(2)
EEKD_ACCESS(4)
EEKD_ACCESS(8)
EEKD_ACCESS(16)
void __tsan_read_range(void* x, size_t n) { race_access(x, n, false); }
void __tsan_write_range(void* x, size_t n) { race_access(x, n, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
uint8_t __tsan_atomic8_load(const volatile uint8_t* x, int order) { return __atomic_load_n(x, order); }
uint32_t __tsan_atomic32_load(const volatile uint32_t* x, int order) { return __atomic_load_n(x, order); }
uint32_t __tsan_atomic32_fetch_add(volatile uint32_t* x, uint32_t y, int order) {
  return __atomic_fetch_add(x, y, order);
}
}
