package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/user"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A Plan says what a process needs. Empty paths are nothing.
type Plan struct {
	RunAs string `json:"user,omitempty"` // name or number of a user; "" stays

	Read  []string `json:"read"`            // files and folders that are read
	Exec  []string `json:"exec"`            // and whose code runs
	Write []string `json:"write"`           // files that are written, and folders in which files are
	Make  []string `json:"make,omitempty"`  // folders in which sockets are made, and files renamed and removed
	Own   []string `json:"owned,omitempty"` // files that RunAs gets

	// TCP ports.
	Bind    []uint16 `json:"bind,omitempty"`
	Connect []uint16 `json:"connect,omitempty"`

	NoLimits bool `json:"-"` // no Landlock: for RunAs alone
}

// A Report says what was applied.
type Report struct {
	User       string   `json:"user,omitempty"`
	NoNewPrivs bool     `json:"no-new-privs"`
	Landlock   int      `json:"landlock"`         // its ABI; 0 is none
	Limits     []string `json:"limits,omitempty"` // what Landlock bounds: files, tcp, signals, abstract-sockets
	Seccomp    string   `json:"seccomp"`          // none, log or kill
	Missing    []string `json:"missing,omitempty"`
}

// String is a line of it.
func (r *Report) String() string {
	yes := map[bool]string{true: "yes", false: "no"}
	s := fmt.Sprintf("no new privileges: %s; landlock: %d; seccomp: %s", yes[r.NoNewPrivs], r.Landlock, r.Seccomp)
	if r.User != "" {
		s += "; user: " + r.User
	}
	if len(r.Missing) > 0 {
		s += "; missing: " + strings.Join(r.Missing, ", ")
	}
	return s
}

// marker is the environment variable by which the program knows that it was
// started anew. It says nothing secret.
const marker = "NVTPM_SANDBOX"

// Entered returns what Enter applied before it started this program anew, or
// nil.
func Entered() *Report {
	text := os.Getenv(marker)
	if text == "" {
		return nil
	}
	r := new(Report)
	if json.Unmarshal([]byte(text), r) != nil {
		return nil
	}
	// What can be asked is asked.
	n, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
	r.NoNewPrivs = err == nil && n == 1
	r.Seccomp = "none"
	return r
}

// Enter applies the plan to this thread and starts the program anew, with the
// same arguments and descriptors. It returns only if that fails.
func Enter(p *Plan) error {
	runtime.LockOSThread() // for good: the thread is what it was made
	r := &Report{Seccomp: "none"}
	if p.RunAs != "" {
		if err := become(p.RunAs, p.Own); err != nil {
			return fmt.Errorf("becoming user %s: %w", p.RunAs, err)
		}
		r.User = p.RunAs
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		r.Missing = append(r.Missing, "no-new-privs: "+err.Error())
	}
	if p.NoLimits {
		r.Missing = append(r.Missing, "landlock: it is switched off")
	} else if err := restrict(p, r); err != nil {
		r.Missing = append(r.Missing, "landlock: "+err.Error())
	}
	text, err := json.Marshal(r)
	if err != nil {
		return err
	}
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	err = unix.Exec(exe, os.Args, append(os.Environ(), marker+"="+string(text)))
	return fmt.Errorf("starting %s in its sandbox: %w", exe, err)
}

// become changes this thread's user and groups, for good, and gives files to
// that user before.
func become(name string, own []string) error {
	u, err := user.Lookup(name)
	if err != nil {
		var id error
		if u, id = user.LookupId(name); id != nil {
			return err
		}
	}
	uid, err := strconv.Atoi(u.Uid)
	if err != nil {
		return err
	}
	gid, err := strconv.Atoi(u.Gid)
	if err != nil {
		return err
	}
	list, err := u.GroupIds()
	if err != nil {
		return err
	}
	groups := make([]uint32, 0, len(list))
	for _, g := range list {
		n, err := strconv.ParseUint(g, 10, 32)
		if err != nil {
			return err
		}
		groups = append(groups, uint32(n))
	}
	if os.Geteuid() == uid && os.Getegid() == gid {
		return nil
	}
	for _, path := range own {
		if err := os.Lchown(path, uid, gid); err != nil {
			return err
		}
	}
	// The thread's own: the C library's functions would change all, and wait
	// for those that aren't its own.
	if err := setgroups(groups); err != nil {
		return fmt.Errorf("groups: %w", err)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(gid), uintptr(gid), uintptr(gid)); e != 0 {
		return fmt.Errorf("group %d: %w", gid, e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); e != 0 {
		return fmt.Errorf("user %d: %w", uid, e)
	}
	if uid != 0 {
		if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, 0, 0, 0); e == 0 {
			return errors.New("the user's rights can be had back")
		}
	}
	return nil
}
