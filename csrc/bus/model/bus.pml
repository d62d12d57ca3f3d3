/* The broadcast ring, its bells, close and death, for spin: what ../PROTOCOL.md says, as a model that can be exhausted.
 *
 * One writer (the driver), READERS readers (workers), each on a CPU of its own with an explicit store buffer: a store
 * enters the CPU's FIFO, and the process `cpu` moves the oldest entry to memory whenever it likes; a load looks into its
 * own CPU's buffer first; a seq_cst fence waits until the buffer is empty. A read-modify-write whose result nobody uses
 * enters the buffer as an addition (it is atomic when it reaches memory, and orders nothing else): the weakest machine
 * that C11 allows does just that (Arm's STADD), so a fence that x86 gets for nothing from its `lock` prefix is missed
 * here when it is taken away.
 *
 * FIFO store buffers are TSO (x86). With -DPSO entries leave out of order, except that two to one word keep their order
 * and a release store waits for all before it: stores as weak as C11 allows them. Loads happen in program order here;
 * what covers machines that reorder those too are the explicit C11 orders in ring.c and bell.c, and c11_handshake.py,
 * which decides the three patterns the protocol consists of in the RC11 memory model.
 *
 * A deadline never fires here, so nothing hides a lost wake-up: a process that sleeps for ever is an invalid end state.
 * Everything a process waits for is finite, and a run has no cycle (but for SPIN), so absence of invalid end states is
 * termination; the formula `ends` says it as LTL.
 *
 * Sizes:  READERS, RECORDS, SLOTS, SPAN (slots of the second record), SPURIOUS (wake-ups out of nothing, in all)
 * Events: READER_DIES (one, anywhere), WRITER_DIES (anywhere), SPIN (waiters may spin as long as they like)
 * Broken: NO_RINGER_FENCE, NO_WAITER_FENCE, PUBLISH_EARLY, FREE_EARLY, SEEN_LATE, CLOSED_LATE, SILENT_WATCHER,
 *         SILENT_CLOSE, RELAXED_PUBLISH (with PSO); each must be found, and tests/trust/test_model.py insists. */

#ifndef READERS
#define READERS 1
#endif
#ifndef RECORDS
#define RECORDS 3
#endif
#ifndef SLOTS
#define SLOTS 2
#endif
#ifndef SPAN
#define SPAN 1
#endif
#ifndef SPURIOUS
#define SPURIOUS 0
#endif

/* ---- the machine ---- */

/* CPUs, by the process that runs there: the writer 0, the readers 1 to READERS, the driver's watcher thread last. */
#define WRITER 0
#define WATCHER (READERS + 1)
#define CPUS (READERS + 2)

/* Words of shared memory. A slot is two words, because a copy is not one access. LOST is the driver's own flag. */
#define TAIL 0
#define CLOSED 1
#define LOST 2
#define VALUE(bell) (3 + (bell))
#define WAITERS(bell) (5 + (bell))
#define HEAD(reader) (6 + (reader))
#define LOW(slot) (7 + READERS + 2 * (slot))
#define HIGH(slot) (8 + READERS + 2 * (slot))
#define WORDS (7 + READERS + 2 * SLOTS)
#define ADD 32     /* + word: the entry adds its value */
#define RELEASE 64 /* + word: everything before it must be in memory first */

#define WORKER_BELL 0
#define SPACE_BELL 1

#define DEPTH 4 /* the fence in `ring` keeps a correct buffer at this or below */

typedef store_buffer {
    byte count;
    byte word[DEPTH];
    byte value[DEPTH];
}

byte memory[WORDS];
store_buffer buffers[CPUS];

bit parked[CPUS]; /* asleep in futex_wait: the readers on the worker bell, the writer on the space bell */
bit dead[CPUS];
byte running = READERS + 1; /* writer and readers that have not come to their end */

/* For the assertions only. */
byte consumed[CPUS]; /* slots whose content the reader has read */
byte published;      /* slots, when the writer closed */

#define count_ buffers[me].count
#define plain(entry) (buffers[me].word[entry] & 31)
#define hit(entry, name) (count_ > entry && plain(entry) == (name))
#define is_add(entry) (buffers[me].word[entry] & ADD)

/* Into a local variable: the newest store of our own, or else memory. */
inline load(result, name)
{
    d_step {
        assert(!(hit(0, name) && is_add(0)) && !(hit(1, name) && is_add(1)) && !(hit(2, name) && is_add(2)) &&
               !(hit(3, name) && is_add(3))); /* nobody loads what he has just added to: the value would be unknown */
        result = (hit(3, name) -> buffers[me].value[3] :
                 (hit(2, name) -> buffers[me].value[2] :
                 (hit(1, name) -> buffers[me].value[1] :
                 (hit(0, name) -> buffers[me].value[0] : memory[name]))))
    }
}

inline store(name, what)
{
    d_step {
        count_ < DEPTH;
        buffers[me].word[count_] = name;
        buffers[me].value[count_] = what;
        count_++
    }
}

#define add(name, what) store(ADD + (name), what) /* read-modify-write, relaxed; 255 is -1 */
#define store_release(name, what) store(RELEASE + (name), what)
#define add_release(name, what) store(RELEASE + ADD + (name), what)
#define fence() count_ == 0 /* seq_cst */

/* The kernel's futex: comparing and falling asleep are one step (it holds the bucket's lock, as a wake does), and both
 * calls are full barriers before they look (kernel/futex/waitwake.c counts on it and says so). */
inline futex_wait(bell)
{
    atomic {
        count_ == 0;
        if
        :: memory[VALUE(bell)] == seen -> parked[me] = 1
        :: else
        fi
    };
    !parked[me]
}

inline futex_wake(bell)
{
    d_step {
        count_ == 0;
        if
        :: bell == SPACE_BELL -> parked[WRITER] = 0
        :: else ->
            parked[1] = 0;
#if READERS > 1
            parked[2] = 0;
#endif
#if READERS > 2
            parked[3] = 0;
#endif
        fi
    }
}

#define fits(entry, reader)                                                                                            \
    assert(plain(entry) < LOW(0) || buffers[me].value[entry] <= consumed[reader] + SLOTS)

/* Entry `entry` becomes visible to everybody. No slot may be overwritten while a reader has not read it. */
inline to_memory(entry)
{
    fits(entry, 1);
#if READERS > 1
    fits(entry, 2);
#endif
#if READERS > 2
    fits(entry, 3);
#endif
    memory[plain(entry)] = (buffers[me].value[entry] + (is_add(entry) -> memory[plain(entry)] : 0)) & 255
}

#define shift(entry)                                                                                                   \
    buffers[me].word[entry] = buffers[me].word[entry + 1];                                                             \
    buffers[me].value[entry] = buffers[me].value[entry + 1]

#define forget_last()                                                                                                  \
    count_--;                                                                                                          \
    buffers[me].word[DEPTH - 1] = 0;                                                                                   \
    buffers[me].value[DEPTH - 1] = 0

#define passes(entry, earlier) (plain(entry) != plain(earlier))
#define may_overtake(entry) (count_ > entry && !(buffers[me].word[entry] & RELEASE))

proctype cpu(byte me)
{
end:
    do
    :: d_step { count_ > 0 -> to_memory(0); shift(0); shift(1); shift(2); forget_last() }
#ifdef PSO
    :: d_step { may_overtake(1) && passes(1, 0) -> to_memory(1); shift(1); shift(2); forget_last() }
    :: d_step { may_overtake(2) && passes(2, 0) && passes(2, 1) -> to_memory(2); shift(2); forget_last() }
    :: d_step { may_overtake(3) && passes(3, 0) && passes(3, 1) && passes(3, 2) -> to_memory(3); forget_last() }
#endif
    od
}

/* ---- the protocol ---- */

/* An `atomic` below holds at most one look at what others write, and steps that are the process's own (its variables,
 * its buffer): the others cannot tell, and there are fewer states. */

/* After the caller's change of a word. */
inline ring(bell)
{
    atomic {
#ifndef NO_RINGER_FENCE
        fence();
#endif
        load(seen, WAITERS(bell));
        if
        :: seen == 0
        :: else -> seen = 0; add_release(VALUE(bell), 1); futex_wake(bell)
        fi
    }
}

/* What follows a check that was not satisfied, up to the next check. The first time: perhaps spin (check again without
 * touching the bell), or register; from then on, sleep. `seen` is what the bell's value was before the check. */
inline pause(bell)
{
    if
    :: !registered ->
#ifdef SPIN
        if
        :: goto look
        :: skip
        fi;
#endif
        add(WAITERS(bell), 1);
        registered = 1;
#ifndef NO_WAITER_FENCE
        fence()
#endif
    :: else ->
#ifdef SEEN_LATE
        load(seen, VALUE(bell));
#endif
        futex_wait(bell)
    fi;
    load(seen, VALUE(bell))
}

inline unregister(bell)
{
    seen = 0;
    if
    :: registered -> registered = 0; add(WAITERS(bell), 255)
    :: else
    fi
}

#define size_of(record) ((record) == 1 -> SPAN : 1) /* in slots */
#define has_room() (position + size_of(record) - free_from <= SLOTS)

/* Every slot carries its position, counted from 1, in both halves. */
inline fill()
{
    do
    :: k < size_of(record) ->
        store(LOW((position + k) % SLOTS), position + k + 1);
        atomic { store(HIGH((position + k) % SLOTS), position + k + 1); k++ }
    :: atomic { k == size_of(record) -> k = 0; break }
    od
}

inline publish()
{
#ifdef RELAXED_PUBLISH
    store(TAIL, position + size_of(record))
#else
    store_release(TAIL, position + size_of(record))
#endif
}

proctype writer(byte me)
{
    byte position, record, free_from, slowest, head, seen, k;
    bit registered, lost;

    {
look:
        do
        :: atomic { record == RECORDS -> goto close }
        :: atomic { record < RECORDS && has_room() -> break }
        :: record < RECORDS && !has_room() ->
            atomic {
                load(lost, LOST);
                if
                :: lost -> goto close
                :: else
                fi;
                slowest = position;
                k = 1
            }
            do
            :: atomic {
                    k <= READERS ->
                    load(head, HEAD(k));
                    slowest = (head < slowest -> head : slowest);
                    head = 0;
                    k++
               }
            :: atomic { k > READERS -> k = 0; break }
            od;
            atomic {
                free_from = slowest;
                slowest = 0;
                if
                :: has_room() -> break
                :: else -> pause(SPACE_BELL)
                fi
            }
        od;
        atomic { unregister(SPACE_BELL) }
#ifdef PUBLISH_EARLY
        publish();
        fill();
#else
        fill();
        publish();
#endif
        atomic { position = position + size_of(record); record++ }
        ring(WORKER_BELL);
        goto look;
close:
        atomic { unregister(SPACE_BELL); published = position; store_release(CLOSED, 1) }
#ifndef SILENT_CLOSE
        ring(WORKER_BELL);
#endif
        skip
    } unless { dead[me] };
    d_step { parked[me] = 0; running-- }
}

inline free(position_after)
{
    store_release(HEAD(me), position_after)
}

proctype reader(byte me)
{
    byte position, record, tail, seen, k, half;
    bit registered, closed;

    {
look:
        do
        ::
#ifdef CLOSED_LATE
            load(tail, TAIL);
            load(closed, CLOSED);
#else
            load(closed, CLOSED);
            load(tail, TAIL);
#endif
            atomic {
                if
                :: tail != position -> break
                :: tail == position && closed -> goto stop
                :: else -> tail = 0; pause(WORKER_BELL)
                fi
            }
        od;
        atomic {
            assert(tail >= position + size_of(record)); /* what is published are whole records */
            tail = 0;
            closed = 0;
            unregister(WORKER_BELL)
        }
#ifdef FREE_EARLY
        free(position + size_of(record));
#endif
        do
        :: k < size_of(record) ->
            atomic {
                load(half, LOW((position + k) % SLOTS));
                assert(half == position + k + 1) /* not torn, lost, doubled or out of order */
            }
            atomic {
                load(half, HIGH((position + k) % SLOTS));
                assert(half == position + k + 1);
                half = 0;
                k++
            }
        :: atomic { k == size_of(record) -> k = 0; break }
        od;
        atomic { position = position + size_of(record); record++; consumed[me] = position }
#ifndef FREE_EARLY
        free(position);
#endif
        ring(SPACE_BELL);
        goto look;
stop:
        atomic {
            tail = 0;
            closed = 0;
            unregister(WORKER_BELL);
            assert(position == published) /* what was published before the close has arrived */
        }
    } unless { dead[me] };
    d_step { parked[me] = 0; running-- }
}

/* ---- what comes from outside ---- */

#ifdef READER_DIES
/* At most one reader is killed. The kernel takes it off the futex's queue; its `waiters` stays. The driver's watcher
 * thread learns of it when it learns of it, sets the driver's flag and rings. */
proctype fate(byte me)
{
    byte seen;

    if
    :: goto nobody
    :: dead[1] = 1
#if READERS > 1
    :: dead[2] = 1
#endif
#if READERS > 2
    :: dead[3] = 1
#endif
    fi;
    store_release(LOST, 1);
#ifndef SILENT_WATCHER
    ring(SPACE_BELL);
#endif
nobody:
    skip
}
#endif

#ifdef WRITER_DIES
/* The driver is killed, or not; each worker's death watch ends its process when it notices. */
proctype fate(byte me)
{
    if
    :: goto nobody
    :: dead[WRITER] = 1
    fi;
    me = 1;
    do
    :: me <= READERS -> dead[me] = 1; me++
    :: else -> break
    od;
nobody:
    skip
}
#endif

#if SPURIOUS
/* Sleepers wake for no reason, but not for ever: that would hide a wake-up that was lost. */
proctype spurious()
{
    byte times;
end:
    do
    :: times < SPURIOUS ->
        if
        :: atomic { parked[WRITER] -> parked[WRITER] = 0 }
        :: atomic { parked[1] -> parked[1] = 0 }
#if READERS > 1
        :: atomic { parked[2] -> parked[2] = 0 }
#endif
#if READERS > 2
        :: atomic { parked[3] -> parked[3] = 0 }
#endif
        :: times = SPURIOUS
        fi;
        times++
    :: else -> break
    od
}
#endif

init
{
    byte i;

    atomic {
        run writer(WRITER);
        run cpu(WRITER);
        i = 1;
        do
        :: i <= READERS -> run reader(i); run cpu(i); i++
        :: else -> i = 0; break
        od;
#if defined(READER_DIES) || defined(WRITER_DIES)
        run fate(WATCHER);
#endif
#ifdef READER_DIES
        run cpu(WATCHER);
#endif
#if SPURIOUS
        run spurious();
#endif
    }
}

ltl ends { <> (running == 0) }
