// Package sandbox takes from a process what it doesn't need: another user's
// rights (RunAs), ways to get more of them (no_new_privs), files and ports
// that it wasn't told of (Landlock), and system calls (seccomp).
//
// Landlock and the user are properties of a thread. A process whose C library
// has threads that Go doesn't know of can't change all of them (purego rules
// out syscall.AllThreadsSyscall), so Enter changes one thread and starts the
// program anew on it: threads that come later inherit. Filter, which comes
// when all is open, has the kernel change all threads itself
// (SECCOMP_FILTER_FLAG_TSYNC).
//
// Each is as much as the kernel can; Report says what that was. Sources: Linux,
// Documentation/userspace-api/landlock.rst, no_new_privs.rst,
// seccomp_filter.rst.
package sandbox
