"""What a forked process costs in memory."""

import os


def private_memory_of_a_child(work) -> float:
    """MB that a forked process gets of its own by doing `work`."""

    def private() -> int:
        with open("/proc/self/smaps_rollup") as file:
            return sum(int(line.split()[1]) for line in file if line.startswith("Private_Dirty"))

    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            before = private()
            work()
            os.write(write, str((private() - before) / 1024).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with open(read) as file:
        return float(file.read())
