package live_test

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image/imagetest"
	"nvstore.dev/machine/live"
	"nvstore.dev/nvstore"
)

// serviceEnv makes this program a service that writes until it is killed.
const serviceEnv = "NVSTORE_TEST_SERVICE"

func TestMain(m *testing.M) {
	if qmp := os.Getenv(serviceEnv); qmp != "" {
		if err := service(qmp); err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// service attaches, says what it finds, counts up from there, and says what was
// acknowledged.
func service(qmp string) error {
	a, err := live.Attach(ctx, qmp, &live.Options{Store: nvstore.Options{Idle: 20 * time.Millisecond}})
	if err != nil {
		return err
	}
	s := a.Store()
	n, err := counter(s)
	if err != nil {
		return err
	}
	fmt.Println("found", n)
	for {
		n++
		err := s.Update(func(tx *nvstore.Tx) error {
			err := errors.Join(tx.Put("counter", []byte(strconv.FormatUint(n, 10)), nil), tx.Put(fmt.Sprintf("ring/%d", n%9), value(n), nil))
			if n%5 == 0 && err == nil {
				err = tx.Delete(fmt.Sprintf("ring/%d", n%9))
			}
			return err
		})
		if err != nil {
			return err
		}
		fmt.Println("acked", n)
	}
}

func counter(s *nvstore.Store) (uint64, error) {
	p, err := s.Get("counter")
	if errors.Is(err, nvstore.ErrNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(string(p), 10, 64)
}

// A running service, and what it said last.
type running struct {
	cmd   *exec.Cmd
	lines *bufio.Scanner
	found uint64
	acked uint64
}

func startService(t *testing.T, qmp string) *running {
	t.Helper()
	r := &running{cmd: exec.Command(os.Args[0])}
	r.cmd.Env = append(os.Environ(), serviceEnv+"="+qmp)
	out, err := r.cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, r.cmd.Start())
	t.Cleanup(func() { _ = r.cmd.Process.Kill(); _ = r.cmd.Wait() })
	r.lines = bufio.NewScanner(out)
	require.True(t, r.lines.Scan(), "the service says nothing")
	text, ok := strings.CutPrefix(r.lines.Text(), "found ")
	require.True(t, ok, "%s", r.lines.Text())
	r.found, err = strconv.ParseUint(text, 10, 64)
	require.NoError(t, err)
	r.acked = r.found
	return r
}

// drain reads what the service said until it ended, and returns the error that
// it ended with, if it had the time to say one.
func (r *running) drain() string {
	for r.lines.Scan() {
		if text, ok := strings.CutPrefix(r.lines.Text(), "acked "); ok {
			if n, err := strconv.ParseUint(text, 10, 64); err == nil {
				r.acked = n
			}
		} else {
			return r.lines.Text()
		}
	}
	return ""
}

// TestKills kills the service, QEMU or both at any moment: what was acknowledged
// is there, and the next service attaches whatever the last one left in QEMU.
func TestKills(t *testing.T) {
	rng := seeded(t)
	v := newVM(t)
	kills := imagetest.Scale(6)
	var acked uint64
	count := map[string]int{}
	for k := range kills {
		if v.qemu == nil {
			v.start()
		}
		r := startService(t, v.qmp)
		require.GreaterOrEqual(t, r.found, acked, "kill %d: an acknowledged write is lost", k)
		time.Sleep(time.Duration(rng.IntN(40_000)) * time.Microsecond)
		what := []string{"service", "qemu", "both"}[rng.IntN(3)]
		if what != "qemu" {
			require.NoError(t, r.cmd.Process.Kill())
		}
		if what != "service" {
			require.NoError(t, v.qemu.Close())
			v.qemu = nil
		}
		said := r.drain()
		_ = r.cmd.Wait()
		if what == "qemu" {
			require.Contains(t, said, "error", "kill %d: the service notices", k)
		}
		acked = r.acked
		count[what]++
		if v.qemu == nil {
			v.offline(func(s *nvstore.Store) {
				n, err := counter(s)
				require.NoError(t, err)
				require.GreaterOrEqual(t, n, acked, "kill %d: an acknowledged write is lost", k)
			})
		}
	}
	t.Logf("%d kills (%v), %d commits acknowledged", kills, count, acked)
	require.NotZero(t, acked)
	if v.qemu != nil {
		v.quit()
	}
	v.offline(func(s *nvstore.Store) {
		n, err := counter(s)
		require.NoError(t, err)
		require.GreaterOrEqual(t, n, acked)
	})
}
