/* Loops shared out among the threads of a parallel region that help each other at the end.
 *
 * Each thread takes its own part in order, piece by piece, as memory likes it; then it takes the last pieces of the others. A loop cut in
 * equal halves ends with the slower core, and cores are seldom equally fast: a third apart, where a host has other work for one of
 * them. Who computes a piece changes nothing in it.
 */
#pragma once
#include <omp.h>
#include <stdatomic.h>
#include <stdint.h>

/* What is taken of one thread's part: pieces from its front, by itself, in the high half; pieces from its back, by others, in the low
 * half. Zero at first, and on a cache line of its own. */
typedef struct {
    _Alignas(64) _Atomic uint64_t taken;
} Share;

/* A thread's way through one loop; `helping` counts from itself. */
typedef struct {
    Share *shares; /* one for each thread */
    long total, step, threads, self, helping;
} Turns;

static inline Turns turns(Share *shares, long total, long step) {
    return (Turns){shares, total, step, omp_get_num_threads(), omp_get_thread_num(), 0};
}

/* A piece of a part of `size`, -1 when it is used up. */
static inline long take(Share *share, long size, int own) {
    uint64_t before = atomic_load_explicit(&share->taken, memory_order_relaxed);
    for (;;) {
        const long front = (long)(before >> 32), back = (long)(before & 0xffffffff);
        if (front + back >= size) return -1;
        const uint64_t after = before + (own ? (uint64_t)1 << 32 : 1);
        if (atomic_compare_exchange_weak_explicit(&share->taken, &before, after, memory_order_relaxed, memory_order_relaxed))
            return own ? front : size - 1 - back;
    }
}

/* Where this thread's next piece of [0, total) begins, `step` long or up to the end; -1 when nothing is left to take. */
static inline long next_turn(Turns *t) {
    const long pieces = (t->total + t->step - 1) / t->step;
    for (; t->helping < t->threads; t->helping++) {
        const long owner = (t->self + t->helping) % t->threads, begin = pieces * owner / t->threads;
        const long piece = take(t->shares + owner, pieces * (owner + 1) / t->threads - begin, t->helping == 0);
        if (piece >= 0) return (begin + piece) * t->step;
    }
    return -1;
}
