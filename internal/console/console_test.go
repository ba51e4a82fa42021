package console_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/internal/console"
)

func TestConsole(t *testing.T) {
	c, err := console.Start("sh", "-c", `printf '\033[1mready\033[0m > '; read x; echo "you said $x"; printf '> '; read y; exit 3`)
	require.NoError(t, err)
	defer c.Close()
	require.NoError(t, c.WaitFor("ready > "))
	said, err := c.Run("hello\n", "> ")
	require.NoError(t, err)
	require.Contains(t, said, "you said hello")
	require.NotContains(t, said, "ready")
	require.NoError(t, c.Type("\n"))
	require.ErrorContains(t, c.WaitFor("more"), "exit status 3")
	require.Error(t, c.Wait())

	_, err = console.Start("no such program")
	require.Error(t, err)
}
