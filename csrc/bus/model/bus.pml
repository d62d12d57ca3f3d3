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
 * which decides the patterns the protocol consists of in the RC11 memory model.
 *
 * A deadline never fires here, so nothing hides a lost wake-up: a process that sleeps for ever is an invalid end state.
 * Everything a process waits for is finite, and a run has no cycle (but for SPIN), so absence of invalid end states is
 * termination; the formula `ends` says it as LTL.
 *
 * Sizes:  READERS, RECORDS, SLOTS, SPAN (slots of the second record), SPURIOUS (wake-ups out of nothing, in all)
 * Events: READER_DIES (one, anywhere), WRITER_DIES (anywhere), SPIN (waiters may spin as long as they like), HERALD (the
 *         writer may ring before a record, too)
 * Broken: NO_RINGER_FENCE, NO_WAITER_FENCE, PUBLISH_EARLY, FREE_EARLY, SEEN_LATE, CLOSED_LATE, SILENT_WATCHER,
 *         SILENT_CLOSE, RELAXED_PUBLISH (with PSO); each must be found, and tests/trust/test_model.py insists. */

#ifndef READERS
#define READERS 1
#endif
#if READERS > 1
#define READER_2(what) what
#else
#define READER_2(what) skip
#endif
#if READERS > 2
#define READER_3(what) what
#else
#define READER_3(what) skip
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

/* CPUs, by the process that runs there: the writer 0, the readers 1 to READERS. */
#define WRITER 0
#define CPUS (READERS + 1)

/* Words of shared memory. A slot is two words, because a copy is not one access. LOST is the driver's own flag. */
#define TAIL 0
#define CLOSED 1
#define LOST 2
#define WAITERS(bell) (3 + (bell))
#define HEAD(reader) (4 + (reader))
#define LOW(slot) (5 + READERS + 2 * (slot))
#define HIGH(slot) (6 + READERS + 2 * (slot))
#define WORDS (5 + READERS + 2 * SLOTS)
#define ADD 32     /* + word: the entry adds its value */
#define RELEASE 64 /* + word: everything before it must be in memory first */

#define WORKER_BELL 0
#define SPACE_BELL 1

#define DEPTH 4 /* two halves, tail and what `unregister` left; the fence in `ring` follows. A store waits for room. */

typedef store_buffer {
    byte count;
    byte word[DEPTH];
    byte value[DEPTH];
}

byte memory[WORDS];
store_buffer buffers[CPUS];

/* A bell's value only grows and is only compared with what a waiter has seen. So it is not a number here but, for each
 * waiter, one bit: incremented since it looked. The readers wait on the worker bell, the writer on the space bell. */
bit rung[CPUS];
bit parked[CPUS]; /* asleep in futex_wait */
byte running = CPUS; /* processes that have not come to their end */

chan kill = [0] of { byte };

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
#define fence() count_ == 0 /* seq_cst */

#define look_at_bell() rung[me] = 0 /* seen = value */

#define for_all_waiters(bell, array, what)                                                                             \
    if                                                                                                                 \
    :: bell == SPACE_BELL -> array[WRITER] = what                                                                      \
    :: else -> array[1] = what; READER_2(array[2] = what); READER_3(array[3] = what)                                   \
    fi

/* The kernel's futex: comparing and falling asleep are one step (it holds the bucket's lock, as a wake does), and both
 * calls are full barriers before they look (kernel/futex/waitwake.c counts on it and says so). For the wake that means:
 * the increment of the bell before it, which waits for what the buffer holds (release), is in memory, as if at once. */
#define futex_wait() atomic { count_ == 0 -> parked[me] = !rung[me] }; !parked[me]
#define increment(bell) d_step { count_ == 0 -> for_all_waiters(bell, rung, 1) }
#define futex_wake(bell) d_step { for_all_waiters(bell, parked, 0) }

#define fits(entry, reader)                                                                                            \
    assert(plain(entry) < LOW(0) || buffers[me].value[entry] <= consumed[reader] + SLOTS)

/* Entry `entry` becomes visible to everybody. No slot may be overwritten while a reader has not read it. */
inline to_memory(entry)
{
    fits(entry, 1);
    READER_2(fits(entry, 2));
    READER_3(fits(entry, 3));
    memory[plain(entry)] = (buffers[me].value[entry] + (is_add(entry) -> memory[plain(entry)] : 0)) & 255
}

#define shift(entry)                                                                                                   \
    buffers[me].word[entry] = buffers[me].word[entry + 1];                                                             \
    buffers[me].value[entry] = buffers[me].value[entry + 1]

#define forget_last()                                                                                                  \
    count_--;                                                                                                          \
    buffers[me].word[count_] = 0;                                                                                      \
    buffers[me].value[count_] = 0

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

#ifdef NO_RINGER_FENCE
#define fence_of_ringer() skip
#else
#define fence_of_ringer() fence()
#endif
#ifdef NO_WAITER_FENCE
#define fence_of_waiter() skip
#else
#define fence_of_waiter() fence()
#endif

/* After the caller's change of a word. */
inline ring(bell)
{
    do
    :: atomic {
            fence_of_ringer();
            load(waiters, WAITERS(bell));
            if
            :: waiters == 0 -> break
            :: else -> waiters = 0
            fi
        }
        increment(bell);
        futex_wake(bell);
        break
    od
}

/* What follows a check that was not satisfied, up to the next check. The first time: register (or spin, which is to
 * check again without touching the bell); from then on, sleep. */
inline pause(bell)
{
    if
    :: atomic { !registered -> registered = 1; add(WAITERS(bell), 1); fence_of_waiter(); look_at_bell() }
#ifdef SPIN
    :: !registered
#endif
#ifdef SEEN_LATE
    :: registered -> look_at_bell(); futex_wait()
#else
    :: registered -> futex_wait(); look_at_bell()
#endif
    fi
}

inline unregister(bell)
{
    rung[me] = 0;
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
        store(HIGH((position + k) % SLOTS), position + k + 1);
        k++
    :: else -> k = 0; break
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
    byte position, record, free_from, slowest, head, waiters, k;
    bit registered, lost;
#ifdef HERALD
    byte heralded; /* records, at most once each */
#endif

    {
look:
        do
        :: atomic {
                record < RECORDS && has_room() ->
                unregister(SPACE_BELL);
#ifdef PUBLISH_EARLY
                publish();
                fill();
#else
                fill();
                publish();
#endif
                position = position + size_of(record);
                record++;
#ifdef HERALD
                heralded = record
#endif
            }
            ring(WORKER_BELL)
#ifdef HERALD
        :: atomic {
                record < RECORDS && heralded == record ->
                heralded = record + 1;
                load(waiters, WAITERS(WORKER_BELL));
                if
                :: waiters == 0 -> goto look
                :: else -> waiters = 0
                fi
            }
            increment(WORKER_BELL);
            futex_wake(WORKER_BELL)
#endif
        :: atomic { record == RECORDS -> break }
        :: atomic {
                record < RECORDS && !has_room() ->
                load(lost, LOST);
                if
                :: lost -> break
                :: else -> slowest = position; k = 1
                fi
            }
            do
            :: atomic {
                    load(head, HEAD(k));
                    slowest = (head < slowest -> head : slowest);
                    head = 0;
                    k++;
                    if
                    :: k <= READERS
                    :: else ->
                        free_from = slowest;
                        slowest = 0;
                        k = 0;
                        if
                        :: has_room() -> goto look
                        :: else -> break
                        fi
                    fi
                }
            od;
            pause(SPACE_BELL)
        od;
        atomic { unregister(SPACE_BELL); published = position; store_release(CLOSED, 1) }
#ifndef SILENT_CLOSE
        ring(WORKER_BELL);
#endif
        skip
    } unless {
        /* Stores enter the buffer in one go above: who is killed between two of them has not done the later ones. */
        atomic {
            kill?eval(me);
            do
            :: count_ > 0 -> forget_last()
            :: break
            od
        }
    };
    d_step {
        position = 0; record = 0; free_from = 0; slowest = 0; head = 0; waiters = 0; k = 0; registered = 0; lost = 0;
#ifdef HERALD
        heralded = 0;
#endif
        parked[me] = 0;
        rung[me] = 0;
        running--
    }
}

inline look_at_ring()
{
    load(tail, TAIL);
    if
    :: tail != position ->
        assert(tail >= position + size_of(record)); /* what is published are whole records */
        tail = 0;
        closed = 0;
        unregister(WORKER_BELL);
#ifdef FREE_EARLY
        store_release(HEAD(me), position + size_of(record));
#endif
        goto copy
    :: else -> tail = 0
    fi
}

inline stop_if_closed()
{
    if
    :: closed -> goto stop
    :: else
    fi
}

proctype reader(byte me)
{
    byte position, record, tail, waiters, k, half;
    bit registered, closed;

    {
look:
        do
        ::
#ifdef CLOSED_LATE
            atomic { look_at_ring() }
            atomic { load(closed, CLOSED); stop_if_closed() }
#else
            load(closed, CLOSED);
            atomic { look_at_ring(); stop_if_closed() }
#endif
            pause(WORKER_BELL)
        od;
copy:
        do
        :: atomic {
                load(half, LOW((position + k) % SLOTS));
                assert(half == position + k + 1) /* not torn, lost, doubled or out of order */
            }
            atomic {
                load(half, HIGH((position + k) % SLOTS));
                assert(half == position + k + 1);
                half = 0;
                k++;
                if
                :: k < size_of(record)
                :: else ->
                    k = 0;
                    position = position + size_of(record);
                    record++;
                    consumed[me] = position;
#ifndef FREE_EARLY
                    store_release(HEAD(me), position);
#endif
                    break
                fi
            }
        od;
        ring(SPACE_BELL);
        goto look;
stop:
        atomic {
            assert(position == published); /* what was published before the close has arrived */
            unregister(WORKER_BELL)
        }
    } unless { kill?eval(me) };
    d_step {
        position = 0; record = 0; tail = 0; waiters = 0; k = 0; half = 0; registered = 0; closed = 0;
        parked[me] = 0;
        rung[me] = 0;
        running--
    }
}

/* ---- what comes from outside ---- */

#ifdef READER_DIES
/* At most one reader is killed, or none. The kernel takes it off the futex's queue; its `waiters` stays. The driver's
 * watcher thread learns of it when it learns of it, sets the driver's flag and rings. Its fence follows that store at
 * once, so its buffer can be left out: nobody can tell it from a slower thread. */
proctype watcher()
{
    bit waiters;

    if
    :: goto nobody
    :: kill!1
#if READERS > 1
    :: kill!2
#endif
#if READERS > 2
    :: kill!3
#endif
    fi;
    memory[LOST] = 1;
#ifndef SILENT_WATCHER
    atomic { waiters = (memory[WAITERS(SPACE_BELL)] != 0) }
    if
    :: atomic { waiters -> waiters = 0; for_all_waiters(SPACE_BELL, rung, 1) }
        futex_wake(SPACE_BELL)
    :: else
    fi;
#endif
nobody:
    skip
}
#endif

#ifdef WRITER_DIES
/* The driver is killed, or not; then each worker's death watch ends its process when it notices. */
proctype death_watch()
{
    if
    :: goto nobody
    :: kill!WRITER
    fi;
end:
    do
    :: kill!1
#if READERS > 1
    :: kill!2
#endif
#if READERS > 2
    :: kill!3
#endif
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

    do
    :: atomic { times < SPURIOUS && parked[WRITER] -> parked[WRITER] = 0; times++ }
    :: atomic { times < SPURIOUS && parked[1] -> parked[1] = 0; times++ }
#if READERS > 1
    :: atomic { times < SPURIOUS && parked[2] -> parked[2] = 0; times++ }
#endif
    :: break
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
#ifdef READER_DIES
        run watcher();
#endif
#ifdef WRITER_DIES
        run death_watch();
#endif
#if SPURIOUS
        run spurious();
#endif
    }
}

ltl ends { <> (running == 0) }
