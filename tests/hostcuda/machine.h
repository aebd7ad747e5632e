// The simulated machine: one fiber a CUDA thread, blocks in turn, and the state that barriers and bulk copies need.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#ifndef __x86_64__
#include <ucontext.h>
#endif

struct uint3 { unsigned x, y, z; };
using dim3 = uint3;
static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;
static constexpr int warpSize = 32;

namespace hostcuda {

using uint64 = unsigned long long;
using uint32 = unsigned int;

constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 1 << 16;
enum Order { kForward, kReverse, kRandom };
enum State { kReady, kExited, kAtSync, kAtWarp, kAtBarrier };

struct Store { void* to; const void* from; std::vector<unsigned char> bytes; int group; };
struct Copy { void* to; const void* from; uint32 bytes; int group; };
// A bulk load, or all of a thread's copies up to an arrival, and that arrival.
struct Load { std::vector<Copy> copies; uint32 bytes; uint64* barrier; bool arrives; };
struct Kept { uint3 block; std::vector<unsigned char> shared; };
struct Barrier { uint64* address; uint32 arrivals, pending; long long bytes; uint32 phase; };

struct Fiber {
  State state;
  int line;  // of the call that it waits in
  uint32 mask;
  uint64 value, gathered[32];
  uint64* barrier;
  std::vector<Store> stores;
  int groups;
  std::vector<Copy> copies;
  int copy_groups;
#ifdef __x86_64__
  void* context;
#else
  ucontext_t context;
#endif
};

static Fiber fibers[kMaxThreads];
static Fiber scheduler;
static Fiber* self = &scheduler;
static unsigned char* stacks;
static int threads, exited, at_sync, sync_line, any_of_block, generation, fence_generation, store_generation;
static std::vector<Load> loads;
static std::vector<Barrier> barriers;
static std::vector<Kept> cluster;  // dynamic shared memory of its blocks when they met: they run in turn
static unsigned char* dynamic_shared;
static long long dynamic_bytes;
static char message[512];
static void (*body)(void*);
static void* body_argument;
static uint64 random_state;

extern "C" __attribute__((visibility("hidden"))) unsigned char hostcuda_shared_begin[], hostcuda_shared_end[];

#ifdef __x86_64__
// Keeps what a call must keep, and changes stacks. (swapcontext makes a system call each time.)
extern "C" void hostcuda_switch(void** from, void* to);
asm(R"(
.pushsection .text
hostcuda_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.popsection
)");
inline void switch_context(Fiber& from, Fiber& to) { hostcuda_switch(&from.context, to.context); }
inline void prepare(Fiber& fiber, unsigned char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  top[-1] = nullptr;  // the return address that the entry never uses; then the entry, then six registers
  top[-2] = reinterpret_cast<void*>(entry);
  fiber.context = top - 8;
}
#else
inline void switch_context(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
inline void prepare(Fiber& fiber, unsigned char* stack, void (*entry)()) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber.context, entry, 0);
}
#endif

inline void yield() { switch_context(*self, scheduler); }

// Ends the launch with a message. In a kernel thread it does not return: the fiber is left where it is.
__attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  const uint3 b = blockIdx, t = threadIdx;
  int length = snprintf(message, sizeof message, "block (%u, %u, %u), ", b.x, b.y, b.z);
  if (self != &scheduler)
    length += snprintf(message + length, sizeof message - length, "thread (%u, %u, %u): ", t.x, t.y, t.z);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message + length, sizeof message - length, format, arguments);
  va_end(arguments);
  while (self != &scheduler) yield();
}

inline void wait(State state, int line) {
  self->state = state;
  self->line = line;
  yield();
}

inline void describe(const Fiber& fiber, char (&text)[80]) {
  const char* const where[] = {"runs", "has exited", "waits at __syncthreads", "waits for lanes of its warp",
                               "waits at barrier_wait"};
  const int length = snprintf(text, sizeof text, "thread %d %s", int(&fiber - fibers), where[fiber.state]);
  if (fiber.state != kExited) snprintf(text + length, sizeof text - length, " in line %d", fiber.line);
}

inline void fail_stuck() {
  const Fiber* first = fibers;
  while (first->state == kExited) first++;
  const Fiber* other = fibers;
  while (other < fibers + threads && other->state == first->state && other->line == first->line) other++;
  char a[80], b[80] = "all others too";
  describe(*first, a);
  if (other < fibers + threads) describe(*other, b);
  fail("deadlock: %s, %s", a, b);
}

inline void exit_thread() {
  if (!self->stores.empty()) fail("exits before bulk_store_commit and bulk_store_wait_read<0> of its bulk stores");
  if (!self->copies.empty()) fail("exits before copy_async_commit and copy_async_wait<0> of its copies");
  if (at_sync) fail("exits while %d threads wait at the __syncthreads of line %d", at_sync, sync_line);
  exited++;
  wait(kExited, 0);
}

inline void fiber_main() {
  body(body_argument);
  exit_thread();
}

// All lanes of the mask meet here; then each has every lane's value in `gathered`.
template <class T>
void meet_lanes(uint32 mask, T value, int line) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value);
  const int lane = int(self - fibers) % 32;
  Fiber* const warp = self - lane;
  const int left = int(fibers + threads - warp), lanes = left < 32 ? left : 32;
  if (!(mask >> lane & 1)) fail("lane %d calls with mask 0x%08x, which leaves it out, in line %d", lane, mask, line);
  if (uint64(mask) >> lanes) fail("mask 0x%08x names lanes that the block lacks, in line %d", mask, line);
  self->value = 0;
  memcpy(&self->value, &value, sizeof value);
  self->mask = mask;
  self->state = kAtWarp;
  self->line = line;
  for (int i = 0; i < lanes; i++)
    if ((mask >> i & 1) && !(warp[i].state == kAtWarp && warp[i].line == line && warp[i].mask == mask)) return yield();
  for (int i = 0; i < lanes; i++) {
    if (!(mask >> i & 1)) continue;
    warp[i].state = kReady;
    for (int j = 0; j < lanes; j++) warp[i].gathered[j] = warp[j].value;
  }
}

template <class T>
T value_of_lane(int lane, int line) {
  if (!(self->mask >> lane & 1)) fail("reads lane %d, which its mask leaves out, in line %d", lane, line);
  T value;
  memcpy(&value, &self->gathered[lane], sizeof value);
  return value;
}

inline int own_lane() { return int(self - fibers) % 32; }

inline bool in_shared(const void* pointer, size_t bytes) {
  const auto inside = [&](const unsigned char* begin, const unsigned char* end) {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    return address >= reinterpret_cast<uintptr_t>(begin) && address + bytes <= reinterpret_cast<uintptr_t>(end);
  };
  return inside(dynamic_shared, dynamic_shared + dynamic_bytes) || inside(hostcuda_shared_begin, hostcuda_shared_end);
}

inline void check_bulk(const char* name, const void* shared, const void* global, uint32 bytes, int line) {
  if (!in_shared(shared, bytes)) fail("%s of %u bytes leaves shared memory, in line %d", name, bytes, line);
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global) | bytes) & 15)
    fail("%s needs addresses and a size of whole 16 bytes: %p, %p, %u in line %d", name, shared, global, bytes, line);
}

inline Barrier& find_barrier(const uint64* address, int line) {
  for (Barrier& barrier : barriers)
    if (barrier.address == address) return barrier;
  fail("uses a barrier before barrier_init, in line %d", line);
  abort();
}

inline void complete_phase(Barrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  barrier.phase++;
  barrier.pending = barrier.arrivals;
  for (int i = 0; i < threads; i++)
    if (fibers[i].state == kAtBarrier && fibers[i].barrier == barrier.address) fibers[i].state = kReady;
}

inline uint64 random_below(uint64 bound) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (random_state >> 11) % bound;
}

inline bool land_load(Order order) {
  if (loads.empty()) return false;
  const size_t chosen = order == kRandom ? random_below(loads.size()) : order == kReverse ? loads.size() - 1 : 0;
  const Load load = loads[chosen];
  loads.erase(loads.begin() + chosen);
  for (const Copy& copy : load.copies) memcpy(copy.to, copy.from, copy.bytes);
  Barrier& barrier = find_barrier(load.barrier, 0);
  barrier.bytes -= load.bytes;
  if (load.arrives) {
    if (!barrier.pending) fail("copies arrive once too often in one phase of a barrier");
    barrier.pending--;
  }
  complete_phase(barrier);
  return true;
}

// Bytewise and not by memset, since under ASan the redzones within the range are not to be written by it.
__attribute__((no_sanitize("address"))) inline void fill_shared(unsigned char* begin, unsigned char* end) {
  for (volatile unsigned char* p = begin; p < end; p++) *p = 0xFF;
}

inline void run_block(Order order) {
  static_assert(kMaxThreads % 32 == 0);
  std::vector<int> sequence(threads);
  exited = at_sync = generation = 0;
  fence_generation = -2;  // older than any
  store_generation = -1;
  loads.clear();
  barriers.clear();
  fill_shared(hostcuda_shared_begin, hostcuda_shared_end);
  fill_shared(dynamic_shared, dynamic_shared + dynamic_bytes);
  for (int i = 0; i < threads; i++) {
    sequence[i] = order == kReverse ? threads - 1 - i : i;
    fibers[i].state = kReady;
    fibers[i].groups = 0;
    fibers[i].stores.clear();
    fibers[i].copy_groups = 0;
    fibers[i].copies.clear();
    prepare(fibers[i], stacks + i * kStackBytes, fiber_main);
  }
  while (exited < threads) {
    bool moved = false;
    if (order == kRandom)
      for (int i = threads - 1; i > 0; i--) std::swap(sequence[i], sequence[random_below(i + 1)]);
    for (int i : sequence) {
      if (fibers[i].state != kReady) continue;
      moved = true;
      self = &fibers[i];
      threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
      switch_context(scheduler, *self);
      self = &scheduler;
      if (message[0]) return;
    }
    if (!moved && !land_load(order)) return fail_stuck();
  }
  if (!loads.empty()) fail("a bulk load was still under way when the block ended: nobody waited for it");
}

struct Launch { long long grid[3], block[3], shared_bytes, order, seed, first, last; };

// Runs the blocks [first, last), in linear order, and returns the message of what went wrong, or null.
template <class... P, size_t... I>
const char* launch(void (*kernel)(P...), void** arguments, const Launch& l, std::index_sequence<I...>) {
  auto call = [&] { kernel(*static_cast<const P*>(arguments[I])...); };
  body = [](void* pointer) { (*static_cast<decltype(call)*>(pointer))(); };
  body_argument = &call;
  gridDim = {unsigned(l.grid[0]), unsigned(l.grid[1]), unsigned(l.grid[2])};
  blockDim = {unsigned(l.block[0]), unsigned(l.block[1]), unsigned(l.block[2])};
  threads = int(l.block[0] * l.block[1] * l.block[2]);
  random_state = uint64(l.seed) * 0x9E3779B97F4A7C15u + 0x1234567u;
  message[0] = 0;
  if (!stacks) stacks = static_cast<unsigned char*>(malloc(kMaxThreads * kStackBytes));
  // Exactly the size asked for, afresh: ASan's redzone then begins right behind the last byte.
  void* shared = nullptr;
  dynamic_bytes = l.shared_bytes;
  if (!stacks || posix_memalign(&shared, 128, dynamic_bytes)) return "out of host memory";
  dynamic_shared = static_cast<unsigned char*>(shared);
  for (long long block = l.first; block < l.last && !message[0]; block++) {
    blockIdx = {unsigned(block % l.grid[0]), unsigned(block / l.grid[0] % l.grid[1]),
                unsigned(block / l.grid[0] / l.grid[1])};
    run_block(Order(l.order));
  }
  free(shared);
  if (!message[0]) return nullptr;
  free(stacks);  // abandoned frames may have left ASan's marks on them
  stacks = nullptr;
  return message;
}

template <class... P>
const char* launch(void (*kernel)(P...), void** arguments, const Launch& l) {
  return launch(kernel, arguments, l, std::index_sequence_for<P...>());
}

// Sizes of the parameters, and -1 behind the last.
template <class... P>
const int* parameter_sizes(void (*)(P...)) {
  static constexpr int sizes[] = {int(sizeof(P))..., -1};
  return sizes;
}

}  // namespace hostcuda

// UBSan's calls, answered here: a misaligned vector, an int that overflows or an index outside its array ends the
// launch with a message, and not the process.
#define HOSTCUDA_UNDEFINED(name, text)                                                                          \
  extern "C" __attribute__((visibility("hidden"))) void __ubsan_handle_##name##_abort(void* data, void*, void*) { \
    struct Source { const char* file; unsigned line, column; };                                                 \
    const Source& source = *static_cast<Source*>(data);                                                         \
    const char* slash = strrchr(source.file, '/');                                                              \
    hostcuda::fail("%s in %s, line %u", text, slash ? slash + 1 : source.file, source.line);                    \
    abort();                                                                                                    \
  }
HOSTCUDA_UNDEFINED(type_mismatch_v1, "misaligned or null address")
HOSTCUDA_UNDEFINED(add_overflow, "signed integer overflow (+)")
HOSTCUDA_UNDEFINED(sub_overflow, "signed integer overflow (-)")
HOSTCUDA_UNDEFINED(mul_overflow, "signed integer overflow (*)")
HOSTCUDA_UNDEFINED(negate_overflow, "signed integer overflow (unary -)")
HOSTCUDA_UNDEFINED(divrem_overflow, "division by zero or its overflow")
HOSTCUDA_UNDEFINED(shift_out_of_bounds, "shift beyond the type's width")
HOSTCUDA_UNDEFINED(out_of_bounds, "index outside its array")
