"""Devices that fail, readers that go away with reads in flight, signals, threads and forks; each in a process of its own."""

from __future__ import annotations

import pytest

from .conftest import Run

READ_ALL = """
reader = make_reader()
buffer = AlignedBuffer(len(content))
reader.wait(begin(reader, reader.open(path, direct=DIRECT), buffer))
assert buffer.numpy().tobytes() == content
print(reader.num_reads)
"""


@pytest.mark.parametrize(("fault", "direct"), [("partial", True), ("odd", False), ("eintr", True)])
def test_partial_and_interrupted_reads_go_on(run_faultily: Run, fault: str, direct: bool) -> None:
    script = READ_ALL.replace("DIRECT", str(direct))
    num_reads = int(run_faultily(script, fault, FLASHLM_IO_BACKEND="threads"))
    assert num_reads > 16 if fault != "eintr" else num_reads == 16


@pytest.mark.parametrize(("times", "is_passing"), [(40, True), (1 << 40, False)])
def test_a_device_that_is_busy_is_asked_again_but_not_for_ever(
    run_faultily: Run, backend: str, times: int, is_passing: bool
) -> None:
    run_faultily(
        f"""
        reader = make_reader(piece_bytes=1 << 20)
        buffer = AlignedBuffer(len(content))
        ticket = begin(reader, reader.open(path), buffer)
        start = time.monotonic()
        for _ in range(2):  # waiting again gives the same again
            try:
                reader.wait(ticket)
            except StorageError as error:
                assert not {is_passing}
                assert error.errno == 11 and "Resource temporarily unavailable" in str(error), error
                assert (error.wanted_bytes, error.got_bytes, error.offset) == (len(content), 0, 0)
            else:
                assert {is_passing} and buffer.numpy().tobytes() == content
        assert time.monotonic() - start < 20
        """,
        "eagain",
        FAULT_TIMES=str(times),
        FLASHLM_IO_BACKEND=backend,
    )


def test_device_error_names_file_and_place_and_spares_other_tickets(run_faultily: Run) -> None:
    run_faultily(
        """
        reader = make_reader()
        file = reader.open(path)
        bad, good = AlignedBuffer(len(content)), AlignedBuffer(65536)
        bad_ticket = begin(reader, file, bad)
        good_ticket = begin(reader, file, good, 131072, 65536)
        try:
            reader.wait(bad_ticket)
        except StorageError as error:
            assert str(error) == f"{path}: reading 65536 bytes at offset 983040 gave 0: Input/output error", error
            assert (error.errno, error.path, error.offset) == (5, str(path), 983040)
            assert (error.wanted_bytes, error.got_bytes) == (65536, 0)
        else:
            raise AssertionError("no error")
        reader.wait(good_ticket)
        assert good.numpy().tobytes() == content[131072:196608]
        """,
        "eio",
        FAULT_OFFSET=str((1 << 20) - 4096),
        FLASHLM_IO_BACKEND="threads",
    )


def test_reader_closes_while_reads_fail(run_faultily: Run) -> None:
    run_faultily(
        """
        reader = make_reader()
        file = reader.open(path)
        for _ in range(50):
            begin(reader, file, AlignedBuffer(len(content)))
        reader.close()
        """,
        "eio",
        FLASHLM_IO_BACKEND="threads",
    )


def test_refused_io_uring_falls_back_to_threads_and_says_so(run_faultily: Run) -> None:
    script = READ_ALL.replace("DIRECT", "True") + "print(reader.describe())\n"
    script += "try: Reader(backend='io_uring')\nexcept FlashError as error: print(error)\n"
    _, described, refused = run_faultily(script, "no_uring", FLASHLM_IO_BACKEND="auto").splitlines()
    assert described.startswith("threads (io_uring refused: Function not implemented)")
    assert refused.startswith("io_uring is refused here: Function not implemented")


def test_threads_that_cannot_be_started_are_an_error(run_faultily: Run) -> None:
    run_faultily(
        """
        os.environ["FAULT"] = "no_thread"
        try:
            Reader(backend="threads", num_threads=8)
        except FlashError as error:
            assert "Resource temporarily unavailable" in str(error), error
        else:
            raise AssertionError("no error")
        """,
        "",
    )


def test_interrupted_wait_raises_soon_and_can_be_taken_up_again(run_faultily: Run, backend: str) -> None:
    run_faultily(
        """
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
        reader = make_reader(piece_bytes=1 << 20)
        buffer = AlignedBuffer(len(content))
        ticket = begin(reader, reader.open(path), buffer)
        assert not reader.is_done(ticket)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        start = time.monotonic()
        try:
            reader.wait(ticket)
        except KeyboardInterrupt:
            assert time.monotonic() - start < 0.6
        else:
            raise AssertionError("not interrupted")
        reader.wait(ticket)
        assert buffer.numpy().tobytes() == content
        assert time.monotonic() - start > 0.7
        """,
        "sleep",
        FAULT_MS="900",
        FLASHLM_IO_BACKEND=backend,
    )


def test_other_threads_run_while_one_waits(run_faultily: Run, backend: str) -> None:
    run_faultily(
        """
        reader = make_reader(piece_bytes=1 << 20)
        ticket = begin(reader, reader.open(path), AlignedBuffer(len(content)))
        waiter = threading.Thread(target=reader.wait, args=(ticket,))
        waiter.start()
        num_steps = 0
        while waiter.is_alive():
            time.sleep(0.01)
            num_steps += 1
        assert num_steps > 15, num_steps
        """,
        "sleep",
        FAULT_MS="500",
        FLASHLM_IO_BACKEND=backend,
    )


def test_close_under_a_waiting_thread_ends_its_wait_with_an_error(run_faultily: Run, backend: str) -> None:
    run_faultily(
        """
        reader = make_reader(num_threads=1, queue_depth=1)
        ticket = begin(reader, reader.open(path), AlignedBuffer(len(content)))
        errors = []

        def wait():
            try:
                reader.wait(ticket)
            except StorageError as error:
                errors.append(error)

        waiters = [threading.Thread(target=wait) for _ in range(2)]
        for waiter in waiters: waiter.start()
        time.sleep(0.1)
        closers = [threading.Thread(target=reader.close) for _ in range(2)]
        for closer in closers: closer.start()
        for thread in closers + waiters: thread.join(10)
        assert not any(thread.is_alive() for thread in closers + waiters)
        assert len(errors) == 2 and all("Operation canceled" in str(error) for error in errors), errors
        """,
        "sleep",
        FAULT_MS="300",
        FLASHLM_IO_BACKEND=backend,
    )


@pytest.mark.parametrize("how", ["pass", "del reader", "reader.close()", "reader.loop = reader; del reader"])
def test_reads_of_a_reader_that_is_gone_do_not_land_in_others_memory(run_script: Run, how: str) -> None:
    run_script(
        f"""
        for _ in range(8):
            reader = make_reader()
            file = reader.open(path)
            for _ in range(8):
                begin(reader, file, AlignedBuffer(len(content)))
            {how}
            gc.collect()
            buffers = [AlignedBuffer(len(content)) for _ in range(8)]
            for buffer in buffers: buffer.numpy()[:] = 0xAA
            time.sleep(0.002)
            assert all((buffer.numpy() == 0xAA).all() for buffer in buffers)
        """
    )


def test_forked_child_may_not_use_the_reader_and_harms_no_read(run_script: Run) -> None:
    run_script(
        """
        reader = make_reader()
        file = reader.open(path)
        buffer = AlignedBuffer(len(content))
        tickets = [begin(reader, file, buffer) for _ in range(4)]
        child = os.fork()
        if child == 0:
            try:
                reader.wait(tickets[0])
            except StorageError as error:
                assert "forked" in str(error)
                file.close(); reader.close()
                del reader, file
                gc.collect()
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        for ticket in tickets: reader.wait(ticket)
        assert buffer.numpy().tobytes() == content
        """
    )


def test_process_ends_with_reads_in_flight(run_script: Run) -> None:
    run_script(
        """
        reader = make_reader()
        file = reader.open(path)
        for _ in range(20): begin(reader, file, AlignedBuffer(len(content)))
        """
    )
