//! Tests of waits: watched eventfds, notifications and timeouts, by each kind of queue.

use super::*;

/// Signals from another thread, each of which must end a wait before the next is sent.
pub(super) fn signals_arrive(queue: &mut HostQueue, flags: i32, poll_first: bool, rounds: u64) {
    let event = EventFd::new(flags | EFD_CLOEXEC).expect("an eventfd");
    let seen = AtomicU64::new(0);
    let sent = AtomicU64::new(0);
    queue.watch(event.try_clone().expect("a second descriptor"));
    if poll_first && let HostQueue::Uring(ring) = queue {
        ring.poll_watches_first();
    }
    let started = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 1..=rounds {
                sent.store(round, Ordering::SeqCst);
                event.write(1).expect("it can be signalled");
                while seen.load(Ordering::SeqCst) < round && started.elapsed() < LONG {
                    std::thread::yield_now();
                }
            }
        });
        while seen.load(Ordering::SeqCst) < rounds {
            queue.wait(Some(LONG));
            assert!(started.elapsed() < LONG, "a signal did not end a wait");
            seen.store(sent.load(Ordering::SeqCst), Ordering::SeqCst);
        }
    });
}

/// The same with the notifier.
pub(super) fn notifications_arrive(queue: &mut HostQueue, rounds: u64) {
    let notifier = queue.notifier();
    let (seen, sent) = (AtomicU64::new(0), AtomicU64::new(0));
    let started = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 1..=rounds {
                sent.store(round, Ordering::SeqCst);
                notifier.notify();
                while seen.load(Ordering::SeqCst) < round && started.elapsed() < LONG {
                    std::hint::spin_loop();
                }
            }
        });
        while seen.load(Ordering::SeqCst) < rounds {
            queue.wait(Some(LONG));
            assert!(started.elapsed() < LONG, "a notification did not end a wait");
            seen.store(sent.load(Ordering::SeqCst), Ordering::SeqCst);
        }
    });
}

#[test]
fn watched_events_and_notifications_end_waits() {
    for mut queue in queues() {
        for poll_first in [false, true] {
            for flags in [0, EFD_NONBLOCK] {
                signals_arrive(&mut queue, flags, poll_first, 2000);
            }
        }
        notifications_arrive(&mut queue, 20_000);
        assert!(queue.in_flight() == 0);
    }
}

#[test]
fn a_signal_taken_while_reaping_ends_the_next_wait() {
    for mut queue in queues() {
        let event = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        queue.watch(event.try_clone().expect("a second descriptor"));
        for _ in 0..10 {
            queue.submit();
            event.write(1).expect("it can be signalled");
            queue.reap(&mut Vec::new());
            let started = Instant::now();
            queue.wait(Some(LONG));
            assert!(started.elapsed() < LONG / 2);
        }
        queue.notifier().notify();
        let started = Instant::now();
        queue.wait(Some(LONG));
        assert!(started.elapsed() < LONG / 2);
    }
}

#[test]
fn an_idle_wait_sleeps_until_its_timeout() {
    for mut queue in queues() {
        let event = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        queue.watch(event);
        // The first waits may end early, because the eventfd turns out to be non-blocking.
        let started = Instant::now();
        let mut waits = 0;
        while started.elapsed() < Duration::from_millis(100) {
            queue.wait(Some(Duration::from_millis(20)));
            waits += 1;
        }
        assert!(waits <= 10, "{waits} waits in 100 ms");
        queue.wait(Some(Duration::ZERO));
    }
}

#[test]
fn a_descriptor_that_is_not_an_eventfd_is_no_longer_watched() {
    for mut queue in queues() {
        let null =
            rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).expect("it opens");
        // SAFETY: the descriptor is ours, and its ownership goes to the EventFd.
        queue.watch(unsafe { EventFd::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(null)) });
        let started = Instant::now();
        let mut waits = 0;
        while started.elapsed() < Duration::from_millis(100) {
            queue.wait(Some(Duration::from_millis(50)));
            waits += 1;
        }
        assert!(waits <= 5, "{waits} waits in 100 ms");
    }
}

/// Waits on a queue whose eventfd always has a signal; returns the number of waits in the given time.
fn waits_in(queue: &mut HostQueue, event: &EventFd, time: Duration) -> u32 {
    let (started, mut waits) = (Instant::now(), 0);
    while started.elapsed() < time {
        event.write(1).expect("it can be signalled");
        queue.wait(Some(Duration::from_millis(20)));
        waits += 1;
    }
    waits
}

#[test]
fn signals_that_are_not_heeded_end_no_wait_and_are_not_lost() {
    for mut queue in queues() {
        let event = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        queue.watch(event.try_clone().expect("a second descriptor"));
        let before = queue.signals();
        assert!(waits_in(&mut queue, &event, Duration::from_millis(40)) > 10, "each signal ends a wait");
        assert!(queue.signals() > before + 10);
        queue.heed_signals(false);
        let waits = waits_in(&mut queue, &event, Duration::from_millis(100));
        assert!(waits <= 8, "{waits} waits in 100 ms");
        let (notifier, started) = (queue.notifier(), Instant::now());
        notifier.notify();
        queue.wait(Some(LONG));
        assert!(started.elapsed() < LONG / 2, "a notification ends a wait all the same");
        let before = queue.signals();
        event.write(1).expect("it can be signalled");
        queue.heed_signals(true);
        while queue.signals() == before {
            queue.wait(Some(LONG));
            assert!(started.elapsed() < LONG / 2, "the signal came while none was heeded");
        }
        signals_arrive(&mut queue, EFD_NONBLOCK, false, 100);
    }
}

#[test]
fn an_event_that_always_has_a_signal_can_be_left_unheeded() {
    for mut queue in queues() {
        let event = EventFd::new(EFD_NONBLOCK | vmm_sys_util::eventfd::EFD_SEMAPHORE).expect("an eventfd");
        event.write(1_000_000).expect("it can be signalled");
        queue.watch(event);
        for _ in 0..3 {
            // The queue meets a signal while it is at work.
            queue.heed_signals(true);
            queue.submit();
            queue.reap(&mut Vec::new());
            queue.heed_signals(false);
            // One signal that was under way may still end a wait; after it, none does.
            let mut waits = 0;
            let started = Instant::now();
            while started.elapsed() < Duration::from_millis(35) {
                queue.wait(Some(Duration::from_millis(20)));
                waits += 1;
            }
            assert!(waits <= 3, "{waits} waits of 20 ms in {:?}", started.elapsed());
        }
    }
}

/// Pauses between signals that come from another thread all the time: each must last.
#[test]
fn a_flood_of_signals_ends_no_pause() {
    for mut queue in queues() {
        let event = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        queue.watch(event.try_clone().expect("a second descriptor"));
        let over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::SeqCst) {
                    event.write(1).expect("it can be signalled");
                    std::thread::sleep(Duration::from_micros(50));
                }
            });
            let (started, mut pauses) = (Instant::now(), 0);
            while started.elapsed() < Duration::from_millis(200) {
                queue.heed_signals(true);
                queue.wait(Some(LONG));
                // Its owner works, and the next signal is waited for meanwhile.
                queue.submit();
                queue.reap(&mut Vec::new());
                queue.heed_signals(false);
                queue.wait(Some(Duration::from_millis(10)));
                pauses += 1;
            }
            over.store(true, Ordering::SeqCst);
            // 20 whole ones, and some that begin late or that a signal under way still ends; without pauses, over 1,000.
            assert!(pauses <= 40, "{pauses} pauses of 10 ms in 200 ms");
            queue.notifier().notify();
            let started = Instant::now();
            queue.wait(Some(LONG));
            assert!(started.elapsed() < LONG / 2, "a notification ends a pause");
        });
    }
}

#[test]
fn a_signal_ends_no_second_wait_after_a_pause() {
    for mut queue in queues() {
        let event = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        queue.watch(event.try_clone().expect("a second descriptor"));
        event.write(1).expect("it can be signalled");
        queue.wait(Some(LONG));
        let signals = queue.signals();
        for _ in 0..5 {
            queue.heed_signals(false);
            queue.wait(Some(Duration::from_millis(1)));
            queue.heed_signals(true);
            queue.wait(Some(Duration::from_millis(1)));
        }
        assert!(queue.signals() <= signals + 1, "{} signals for one", queue.signals());
    }
}

#[test]
fn an_error_of_an_unheeded_descriptor_ends_no_wait_twice() {
    for mut queue in queues() {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        // SAFETY: the descriptor is ours, and its ownership goes to the EventFd.
        queue.watch(unsafe { EventFd::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(writer)) });
        queue.heed_signals(false);
        drop(reader);
        let (started, mut waits) = (Instant::now(), 0);
        while started.elapsed() < Duration::from_millis(100) {
            queue.wait(Some(Duration::from_millis(20)));
            waits += 1;
        }
        assert!(waits <= 7, "{waits} waits of 20 ms in 100 ms");
    }
}
