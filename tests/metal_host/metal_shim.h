// As much of the Metal Shading Language as this project's kernels use, for a host compiler.
//
// A threadgroup runs as one fiber per thread, switched where threads wait for each other. That
// finds: collective operations that not all threads reach, or reach at different lines; data
// races and reads of unwritten values in threadgroup memory; indices out of its bounds; faults
// on the guard pages that the launcher puts around every buffer; shifts and integer arithmetic
// without a defined result (the sanitizer's traps).
#pragma once
#include <cmath>
#include <csignal>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
struct uint3 {
    uint x, y, z;
};

#ifdef SHIM_ADDRESS_SPACES
// clang makes mixing these up a type error, as Metal does. Only its front end runs then, so
// plain numbers may stand for the 16-bit types: a class cannot live in an address space.
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
typedef short half;
typedef short bfloat;
#else
#define device
#define constant
#define threadgroup

// Conversions from float are explicit, which is stricter than Metal; arithmetic is in float.
struct bfloat {
    uint16_t bits;
    bfloat() = default;
    explicit bfloat(float value) {
        uint32_t u;
        std::memcpy(&u, &value, 4);
        const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
        bits = uint16_t(nan ? (u >> 16) | 64u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
    }
    operator float() const {
        const uint32_t u = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &u, 4);
        return value;
    }
};

struct half {
    uint16_t bits;
    half() = default;
    explicit half(float value) {
        const uint16_t sign = std::signbit(value) ? 0x8000u : 0u;
        const float size = std::fabs(value);
        if (!(size < 65520.0f)) {
            bits = uint16_t(sign | (std::isnan(value) ? 0x7e00u : 0x7c00u));
            return;
        }
        // In units of the last place, which stops shrinking at 2^-24; rounds half to even.
        int exponent = 0;
        std::frexp(size, &exponent);
        exponent = exponent < -13 || size == 0.0f ? -13 : exponent;
        const uint32_t ulps = uint32_t(std::nearbyint(std::ldexp(size, 11 - exponent)));
        // A normal number has 1024 to 2048 of them; a carry moves into the exponent by itself.
        bits = uint16_t(sign | (uint32_t(exponent + 13) * 1024u + ulps));
    }
    operator float() const {
        const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
        float size = exponent == 0 ? std::ldexp(float(fraction), -24)
                                   : std::ldexp(float(fraction + 1024), exponent - 25);
        if (exponent == 31) {
            size = fraction != 0 ? NAN : INFINITY;
        }
        return (bits & 0x8000u) != 0 ? -size : size;
    }
};
#endif
typedef half float16_t;
typedef bfloat bfloat16_t;

namespace shim {

enum { MAX_THREADS = 1024, SIMD_WIDTH = 32, STACK_BYTES = 1 << 16 };
enum Wait { RUNNING, AT_BARRIER, AT_SIMD, RETURNED };

struct Position {
    uint3 thread_position_in_grid, thread_position_in_threadgroup, threadgroup_position_in_grid;
    uint3 threads_per_threadgroup, threads_per_grid, threadgroups_per_grid;
    uint thread_index_in_threadgroup, thread_index_in_simdgroup, simdgroup_index_in_threadgroup;
    uint simdgroups_per_threadgroup, threads_per_simdgroup;
};

typedef void (*Body)(void** buffers, const Position& position);

struct Thread {
    ucontext_t context;
    Position position;
    Wait wait;
    int line;
    uint generation;
    float value;
};

// Threads that have to meet: the whole threadgroup at a barrier, a SIMD group at an operation.
struct Meeting {
    uint members, arrived, generation;
    int line;
    const char* operation;
    float values[2][SIMD_WIDTH];
};

struct State {
    Thread threads[MAX_THREADS];
    Meeting barrier, simd[MAX_THREADS / SIMD_WIDTH];
    ucontext_t scheduler;
    char* stacks;
    uint count, current, epoch, group_number, random;
    uint order[MAX_THREADS];
    Body body;
    void** buffers;
    bool running, failed;
    char* message;
    void* fault;
};
static State state;

// The kernel stops here: back to the scheduler, which ends the launch.
[[noreturn]] static inline void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    const int length = std::vsnprintf(state.message, 200, format, arguments);
    va_end(arguments);
    std::snprintf(state.message + length, 56, " (thread %u)", state.current);
    state.failed = true;
    setcontext(&state.scheduler);
    std::abort();
}

static inline void pause(Wait wait, int line) {
    Thread& thread = state.threads[state.current];
    thread.wait = wait;
    thread.line = line;
    swapcontext(&thread.context, &state.scheduler);
}

static inline Meeting& meeting_of(uint thread, Wait wait) {
    return wait == AT_BARRIER ? state.barrier : state.simd[thread / SIMD_WIDTH];
}

// Returns when every member of the meeting has arrived; the generation that it completes.
static inline uint meet(Wait wait, const char* operation, int line) {
    Meeting& meeting = meeting_of(state.current, wait);
    Thread& thread = state.threads[state.current];
    if (meeting.arrived != 0 && (meeting.line != line || meeting.operation != operation)) {
        fail("divergence: %s at line %d meets %s at line %d", operation, line, meeting.operation,
             meeting.line);
    }
    meeting.line = line;
    meeting.operation = operation;
    thread.generation = meeting.generation;
    const uint completes = meeting.generation;
    if (++meeting.arrived == meeting.members) {
        meeting.arrived = 0;
        ++meeting.generation;
        state.epoch += wait == AT_BARRIER;
    } else {
        pause(wait, line);
    }
    return completes;
}

// Threadgroup memory that knows who touched each element since the last barrier. It is static,
// hence zero at first, and no group has the number zero.
template <class T> struct Cell {
    // Group and epoch of the last access; an older group's are as good as none.
    uint write_group, write_epoch, read_group, read_epoch;
    int writer, reader;
    T value;

    void check(const char* what, uint group, uint epoch, int who) const {
        const bool now = group == state.group_number && epoch == state.epoch;
        if (now && who != int(state.current)) {
            fail("data race: %s an element of threadgroup memory without a barrier", what);
        }
    }
    operator T() {
        if (write_group != state.group_number) {
            fail("reads an element of threadgroup memory that nobody wrote");
        }
        check("reads what another thread wrote,", write_group, write_epoch, writer);
        const bool first = read_group != state.group_number || read_epoch != state.epoch;
        // -1: more than one thread.
        reader = first || reader == int(state.current) ? int(state.current) : -1;
        read_group = state.group_number;
        read_epoch = state.epoch;
        return value;
    }
    Cell& operator=(T assigned) {
        check("writes what another thread wrote,", write_group, write_epoch, writer);
        check("writes what another thread reads,", read_group, read_epoch, reader);
        writer = int(state.current);
        write_group = state.group_number;
        write_epoch = state.epoch;
        value = assigned;
        return *this;
    }
    Cell& operator+=(T added) { return *this = T(*this) + added; }
};

template <class T, int N> struct Shared {
    static_assert(sizeof(T) * N <= 32768, "a threadgroup has 32 KiB of memory");
    Cell<T> cells[N];
    Cell<T>& operator[](long index) {
        if (index < 0 || index >= N) {
            fail("index %ld is outside of threadgroup memory [%d]", index, N);
        }
        return cells[index];
    }
};

static inline void thread_main() {
    state.body(state.buffers, state.threads[state.current].position);
    pause(RETURNED, 0);
}

static inline bool ready(uint index) {
    const Thread& thread = state.threads[index];
    if (thread.wait == RUNNING) {
        return true;
    }
    return thread.wait != RETURNED
           && meeting_of(index, thread.wait).generation != thread.generation;
}

static inline void shuffle() {
    for (uint i = state.count - 1; state.random != 0 && i > 0; --i) {
        state.random = state.random * 1664525u + 1013904223u;
        const uint j = (state.random >> 8) % (i + 1);
        const uint other = state.order[i];
        state.order[i] = state.order[j];
        state.order[j] = other;
    }
}

static inline void prepare_group(uint3 group, uint3 groups, uint3 size, uint3 full, uint3 grid) {
    State& s = state;
    s.count = size.x * size.y * size.z;
    ++s.group_number;
    s.barrier = Meeting{};
    s.barrier.members = s.count;
    for (uint i = 0; i < s.count; ++i) {
        Meeting& simd = s.simd[i / SIMD_WIDTH];
        simd = i % SIMD_WIDTH == 0 ? Meeting{} : simd;
        ++simd.members;
        Thread& thread = s.threads[i];
        const uint3 at = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
        Position& p = thread.position;
        p.thread_position_in_threadgroup = at;
        p.thread_position_in_grid =
            uint3{group.x * full.x + at.x, group.y * full.y + at.y, group.z * full.z + at.z};
        p.threadgroup_position_in_grid = group;
        p.threads_per_threadgroup = size;
        p.threads_per_grid = grid;
        p.threadgroups_per_grid = groups;
        p.thread_index_in_threadgroup = i;
        p.thread_index_in_simdgroup = i % SIMD_WIDTH;
        p.simdgroup_index_in_threadgroup = i / SIMD_WIDTH;
        p.simdgroups_per_threadgroup = (s.count + SIMD_WIDTH - 1) / SIMD_WIDTH;
        p.threads_per_simdgroup = SIMD_WIDTH;
        thread.wait = RUNNING;
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = s.stacks + size_t(i) * STACK_BYTES;
        thread.context.uc_stack.ss_size = STACK_BYTES;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, thread_main, 0);
        s.order[i] = i;
    }
}

static inline void report_deadlock() {
    uint waiting = 0, returned = 0;
    int line = 0;
    for (uint i = 0; i < state.count; ++i) {
        const Thread& thread = state.threads[i];
        returned += thread.wait == RETURNED;
        waiting += thread.wait != RETURNED;
        line = thread.wait != RETURNED ? thread.line : line;
    }
    std::snprintf(state.message, 256,
                  "divergence: %u threads wait at line %d or elsewhere for others that never "
                  "arrive; %u threads returned",
                  waiting, line, returned);
    state.failed = true;
}

static inline void run_group() {
    uint returned = 0;
    while (returned < state.count && !state.failed) {
        bool progress = false;
        shuffle();
        for (uint k = 0; k < state.count && !state.failed; ++k) {
            const uint i = state.order[k];
            if (!ready(i)) {
                continue;
            }
            progress = true;
            state.current = i;
            state.threads[i].wait = RUNNING;
            swapcontext(&state.scheduler, &state.threads[i].context);
            returned += state.threads[i].wait == RETURNED;
        }
        if (!progress && !state.failed) {
            report_deadlock();
        }
    }
}

static void on_signal(int signal, siginfo_t* info, void*) {
    if (!state.running) {
        // Not ours: let it happen again with the default action.
        std::signal(signal, SIG_DFL);
        return;
    }
    const bool memory = signal == SIGSEGV || signal == SIGBUS;
    state.fault = memory ? info->si_addr : nullptr;
    fail(memory ? "out of bounds" : "undefined integer arithmetic or array index");
}

// 0, or 1 with a message and, for a memory fault, its address.
static inline int run(Body body, void** buffers, const uint* grid, const uint* threadgroup_size,
                      uint seed, char* message, void** fault) {
    static const int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
    struct sigaction before[4], mine;
    std::memset(&mine, 0, sizeof mine);
    mine.sa_sigaction = on_signal;
    mine.sa_flags = SA_SIGINFO;
    State& s = state;
    if (s.stacks == nullptr) {
        s.stacks = static_cast<char*>(std::malloc(size_t(MAX_THREADS) * STACK_BYTES));
    }
    s.body = body;
    s.buffers = buffers;
    s.message = message;
    s.failed = false;
    s.fault = nullptr;
    s.random = seed;
    const uint full[3] = {threadgroup_size[0] < grid[0] ? threadgroup_size[0] : grid[0],
                          threadgroup_size[1] < grid[1] ? threadgroup_size[1] : grid[1],
                          threadgroup_size[2] < grid[2] ? threadgroup_size[2] : grid[2]};
    uint groups[3], size[3];
    for (int i = 0; i < 3; ++i) {
        groups[i] = (grid[i] + full[i] - 1) / full[i];
    }
    for (int i = 0; i < 4; ++i) {
        sigaction(signals[i], &mine, &before[i]);
    }
    s.running = true;
    const uint all = groups[0] * groups[1] * groups[2];
    for (uint number = 0; number < all && !s.failed; ++number) {
        // With shuffled threads the threadgroups run from the last to the first.
        const uint g = seed != 0 ? all - 1 - number : number;
        const uint at[3] = {g % groups[0], g / groups[0] % groups[1], g / (groups[0] * groups[1])};
        for (int i = 0; i < 3; ++i) {
            const uint left = grid[i] - at[i] * full[i];
            size[i] = left < full[i] ? left : full[i];
        }
        prepare_group(uint3{at[0], at[1], at[2]}, uint3{groups[0], groups[1], groups[2]},
                      uint3{size[0], size[1], size[2]}, uint3{full[0], full[1], full[2]},
                      uint3{grid[0], grid[1], grid[2]});
        run_group();
    }
    s.running = false;
    for (int i = 0; i < 4; ++i) {
        sigaction(signals[i], &before[i], nullptr);
    }
    *fault = s.fault;
    return s.failed;
}

}  // namespace shim

template <class To, class From> inline To as_type(From from) {
    static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

namespace metal {
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };

template <class N> inline N min(N a, N b) { return b < a ? b : a; }
template <class N> inline N max(N a, N b) { return a < b ? b : a; }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float sqrt(float a) { return std::sqrt(a); }

// Adds as a tree over 32 lanes. Metal does not say in which order it adds.
inline float simd_sum(float value, int line = __builtin_LINE()) {
    const uint lane = shim::state.current % shim::SIMD_WIDTH;
    shim::Meeting& meeting = shim::state.simd[shim::state.current / shim::SIMD_WIDTH];
    // Two generations of values: a fast lane may be at the next operation already.
    meeting.values[meeting.generation % 2][lane] = value;
    const uint generation = shim::meet(shim::AT_SIMD, "simd_sum", line);
    float sums[shim::SIMD_WIDTH] = {};
    std::memcpy(sums, meeting.values[generation % 2], meeting.members * sizeof(float));
    for (int width = shim::SIMD_WIDTH / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) {
            sums[i] += sums[i + width];
        }
    }
    return sums[0];
}

inline void threadgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
    // Other flags do not order threadgroup memory, and the race check relies on every barrier.
    if (flags != mem_flags::mem_threadgroup) {
        shim::fail("threadgroup_barrier at line %d does not order threadgroup memory", line);
    }
    shim::meet(shim::AT_BARRIER, "threadgroup_barrier", line);
}
}  // namespace metal
using metal::threadgroup_barrier;
