package sandbox

import (
	"errors"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Rights on files and folders, by what a Plan asks for.
const (
	fsRead  = unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_READ_DIR
	fsExec  = fsRead | unix.LANDLOCK_ACCESS_FS_EXECUTE
	fsWrite = fsRead | unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_TRUNCATE | unix.LANDLOCK_ACCESS_FS_IOCTL_DEV
	fsMake  = unix.LANDLOCK_ACCESS_FS_MAKE_SOCK | unix.LANDLOCK_ACCESS_FS_MAKE_REG | unix.LANDLOCK_ACCESS_FS_REMOVE_FILE
	fsTree  = fsWrite | fsMake | unix.LANDLOCK_ACCESS_FS_MAKE_DIR | unix.LANDLOCK_ACCESS_FS_REMOVE_DIR | unix.LANDLOCK_ACCESS_FS_REFER

	// fsFile are those that a file, not a folder, can have.
	fsFile = unix.LANDLOCK_ACCESS_FS_EXECUTE | unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_READ_FILE |
		unix.LANDLOCK_ACCESS_FS_TRUNCATE | unix.LANDLOCK_ACCESS_FS_IOCTL_DEV
)

// handled are the rights that each version of the interface knows.
func handled(abi int) uint64 {
	all := uint64(unix.LANDLOCK_ACCESS_FS_MAKE_SYM)<<1 - 1
	if abi >= 2 {
		all |= unix.LANDLOCK_ACCESS_FS_REFER
	}
	if abi >= 3 {
		all |= unix.LANDLOCK_ACCESS_FS_TRUNCATE
	}
	if abi >= 5 {
		all |= unix.LANDLOCK_ACCESS_FS_IOCTL_DEV
	}
	return all
}

const (
	netBind    = 1 // LANDLOCK_ACCESS_NET_BIND_TCP
	netConnect = 2 // LANDLOCK_ACCESS_NET_CONNECT_TCP

	scopeAbstract = 1 // LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET
	scopeSignal   = 2 // LANDLOCK_SCOPE_SIGNAL

	rulePath = 1 // LANDLOCK_RULE_PATH_BENEATH
	ruleNet  = 2 // LANDLOCK_RULE_NET_PORT

	askVersion = 1 // LANDLOCK_CREATE_RULESET_VERSION
)

// rulesetAttr, pathAttr and netAttr are linux/landlock.h's; the second has no
// padding there, which the kernel doesn't read.
type (
	rulesetAttr struct{ fs, net, scoped uint64 }
	pathAttr    struct {
		allowed uint64
		fd      int32
	}
	netAttr struct{ allowed, port uint64 }
)

// Version returns the kernel's version of Landlock, 0 for none.
func Version() int {
	abi, _, e := unix.RawSyscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, askVersion)
	if e != 0 {
		return 0
	}
	return int(abi)
}

// restrict bounds this thread to what the plan names.
func restrict(p *Plan, r *Report) error {
	abi := Version()
	if abi == 0 {
		return errors.New("this kernel has none")
	}
	attr := rulesetAttr{fs: handled(abi)}
	size := unsafe.Sizeof(attr.fs)
	limits := []string{"files"}
	if abi >= 4 {
		attr.net, size = netBind|netConnect, 2*unsafe.Sizeof(attr.fs)
		limits = append(limits, "tcp")
	}
	if abi >= 6 {
		attr.scoped, size = scopeAbstract|scopeSignal, unsafe.Sizeof(attr)
		limits = append(limits, "abstract-sockets", "signals")
	}
	fd, _, e := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), size, 0)
	runtime.KeepAlive(&attr)
	if e != 0 {
		return e
	}
	s := &ruleset{fd: int(fd), fs: attr.fs}
	defer unix.Close(s.fd)
	if err := s.files(p); err != nil {
		return err
	}
	if abi >= 4 {
		if err := s.ports(p); err != nil {
			return err
		}
	}
	if _, _, e := unix.RawSyscall(unix.SYS_LANDLOCK_RESTRICT_SELF, uintptr(s.fd), 0, 0); e != 0 {
		return e
	}
	r.Landlock, r.Limits = abi, limits
	return nil
}

// A ruleset is one of the kernel's.
type ruleset struct {
	fd int
	fs uint64 // what is bounded
}

func (s *ruleset) files(p *Plan) error {
	for _, l := range []struct {
		paths  []string
		rights uint64
	}{{p.Read, fsRead}, {p.Exec, fsExec}, {p.Make, fsMake}} {
		for _, path := range l.paths {
			if err := s.file(path, l.rights); err != nil {
				return err
			}
		}
	}
	for _, path := range p.Write {
		rights := uint64(fsWrite)
		if info, err := os.Stat(path); err == nil && info.IsDir() {
			rights = fsTree
		}
		if err := s.file(path, rights); err != nil {
			return err
		}
	}
	return nil
}

// file allows something below a path. One that isn't there stays out of reach.
func (s *ruleset) file(path string, rights uint64) error {
	if path == "" {
		return nil
	}
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		rights &= fsFile
	}
	attr := pathAttr{allowed: rights & s.fs, fd: int32(fd)}
	return s.add(rulePath, unsafe.Pointer(&attr))
}

func (s *ruleset) ports(p *Plan) error {
	for _, l := range []struct {
		ports  []uint16
		rights uint64
	}{{p.Bind, netBind}, {p.Connect, netConnect}} {
		for _, port := range l.ports {
			attr := netAttr{l.rights, uint64(port)}
			if err := s.add(ruleNet, unsafe.Pointer(&attr)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *ruleset) add(kind uintptr, attr unsafe.Pointer) error {
	_, _, e := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, uintptr(s.fd), kind, uintptr(attr), 0, 0, 0)
	if e != 0 {
		return e
	}
	return nil
}

// setgroups changes this thread's groups.
func setgroups(list []uint32) error {
	var first unsafe.Pointer
	if len(list) > 0 {
		first = unsafe.Pointer(&list[0])
	}
	_, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(list)), uintptr(first), 0)
	runtime.KeepAlive(list)
	if e != 0 {
		return e
	}
	return nil
}
