package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"nvstore.dev/nvstore"
)

func (a *app) serveCmd() *cobra.Command {
	return group("serve", "Export blobs, or an image, to other programs",
		a.serveNBDCmd(), a.serveFUSECmd())
}

// A daemon is a verb that runs until it is told to stop, and says when it is
// ready: on standard output, in a file with its process ID, and to systemd.
type daemon struct {
	*app
	pidFile string

	mu      sync.Mutex
	said    time.Time
	silence int
}

// ready tells everybody who waits. The function it returns takes that back.
func (d *daemon) ready() (undo func() error, err error) {
	if d.pidFile != "" {
		err := d.writeFile(d.pidFile, strconv.Itoa(os.Getpid())+"\n")
		if err != nil {
			return nil, err
		}
	}
	if err := notify("READY=1"); err != nil {
		d.warnf("systemd wasn't told: %v", err)
	}
	return func() error {
		_ = notify("STOPPING=1")
		if d.pidFile == "" {
			return nil
		}
		if err := os.Remove(d.pidFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}, nil
}

func (d *daemon) writeFile(path, text string) error {
	return os.WriteFile(path, []byte(text), 0o644)
}

// notify tells systemd, if it started us and wants to know (sd_notify(3)).
func notify(state string) error {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return err
	}
	_, err = c.Write([]byte(state))
	return errors.Join(err, c.Close())
}

// complain warns of what a client did or met, ten times a second at most.
func (d *daemon) complain(who string, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if time.Since(d.said) < 100*time.Millisecond {
		d.silence++
		return
	}
	more := ""
	if d.silence > 0 {
		more = fmt.Sprintf(" (and %d more)", d.silence)
	}
	d.said, d.silence = time.Now(), 0
	d.warnf("%s: %s%s", printable(who), printable(err.Error()), more)
}

// inherited returns the sockets that systemd passed (sd_listen_fds(3)).
func inherited() ([]net.Listener, error) {
	if pid, _ := strconv.Atoi(os.Getenv("LISTEN_PID")); pid != os.Getpid() {
		return nil, nil
	}
	n, err := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	if err != nil || n < 0 || n > 64 {
		return nil, invalidf("LISTEN_FDS is %q: a number of sockets, at most 64", os.Getenv("LISTEN_FDS"))
	}
	var list []net.Listener
	for fd := 3; fd < 3+n; fd++ {
		f := os.NewFile(uintptr(fd), "socket "+strconv.Itoa(fd))
		l, err := net.FileListener(f)
		_ = f.Close()
		if err != nil {
			return nil, fmt.Errorf("socket %d of LISTEN_FDS: %w", fd, err)
		}
		list = append(list, l)
	}
	return list, nil
}

// sized are NAME=SIZE flags.
type sized struct {
	name string
	size int64
}

func parseSized(list []string) ([]sized, error) {
	var out []sized
	for _, text := range list {
		name, value, err := splitPair(text)
		if err != nil {
			return nil, err
		}
		names, err := canonical([]string{name})
		if err != nil {
			return nil, err
		}
		n, err := parseSize(value)
		if err != nil {
			return nil, err
		}
		out = append(out, sized{names[0], n})
	}
	return out, nil
}

// servedChunkSize is chunkSizeFor for a device, whose requests are small: it
// goes on with small chunks for longer.
func servedChunkSize(n int64) int {
	if n <= 64<<20 {
		return 8 << 10
	}
	return chunkSizeFor(n)
}

// makeBlobs makes blobs that are missing, and gives others a new size, all in
// one commit.
func (a *app) makeBlobs(s *nvstore.Store, create, resize []sized) error {
	if len(create)+len(resize) == 0 {
		return nil
	}
	return s.Update(func(tx *nvstore.Tx) error {
		for _, c := range create {
			e, err := tx.Stat(c.name)
			switch {
			case errors.Is(err, nvstore.ErrNotFound):
				if err := tx.Create(c.name, &nvstore.Meta{ChunkSize: servedChunkSize(c.size)}); err != nil {
					return err
				}
				if err := tx.Truncate(c.name, c.size); err != nil {
					return err
				}
			case err != nil:
				return err
			case e.Size != c.size:
				return withHint(fmt.Errorf("%w: blob %q has %d bytes, not %d", nvstore.ErrExist, c.name, e.Size, c.size),
					"give --resize "+strings.TrimSpace(c.name)+"=SIZE to change its size")
			}
		}
		for _, r := range resize {
			if _, err := tx.Stat(r.name); err != nil {
				return err
			}
			if err := tx.Truncate(r.name, r.size); err != nil {
				return err
			}
		}
		return nil
	})
}
